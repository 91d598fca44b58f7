"""An inferer's entry in the bucket `INFERERS`: how gateways learn of it and of its model."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from shared.background import keep_running
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.inferers import InfererEntry

REFRESH_S = 1.0
IDLE_REFRESH_S = 2.0
"""Without jobs. Less than `sluice doctor` waits for a heartbeat (3 s)."""

log = logger()


@asynccontextmanager
async def presence(
    broker: Broker, describe: Callable[[], InfererEntry], active: asyncio.Event
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Keep the entry that ``describe`` returns alive during the block, remove it at its end.
    ``active`` is set while there are jobs.

    Enters once the entry is stored, so that gateways can see this inferer. Yields a function that
    stores the current entry at once.
    """
    own = describe()
    entry = _Entry(broker, subjects.inferer(own.model, own.id))
    while not await entry.put(describe()):
        await asyncio.sleep(RETRY_DELAY_S)

    async def store() -> None:
        await entry.put(describe())

    async def refresh() -> None:
        current, now = own, asyncio.get_running_loop().time
        while True:
            is_idle = current.state == "idle"
            due = now() + (IDLE_REFRESH_S if is_idle else REFRESH_S)
            if is_idle:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await active.wait()
            await asyncio.sleep(min(REFRESH_S, due - now()))
            current = describe()
            await entry.put(current)

    refreshing = keep_running(refresh, "refresh the entry")
    try:
        yield store
    finally:
        refreshing.cancel()
        await entry.remove()


class _Entry:
    def __init__(self, broker: Broker, subject: str) -> None:
        self._broker = broker
        self._subject = subject
        self._is_failure_logged = False
        """Whether the log says that it cannot be stored."""

    async def put(self, entry: InfererEntry) -> bool:
        """Store ``entry``. Returns whether the broker confirmed it."""
        return await self._publish(encode(entry), {})

    async def remove(self) -> None:
        """Leave a marker that it is gone."""
        await self._publish(b"", {"KV-Operation": "DEL"})

    async def _publish(self, payload: bytes, headers: dict[str, str]) -> bool:
        if not self._broker.is_connected:
            return False
        try:
            await self._broker.publish_stored(self._subject, payload, headers, patience_s=0)
        except BrokerUnavailable as error:
            if self._broker.is_connected and not self._is_failure_logged:
                self._is_failure_logged = True
                log.warning(
                    "presence_not_stored",
                    error=error.message,
                    hint="start a gateway, or run: sluice topology apply",
                )
            return False
        self._is_failure_logged = False
        return True
