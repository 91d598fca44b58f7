"""An inferer's entry in the bucket `INFERERS`: how gateways learn of it and of its model."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from shared import subjects
from shared.broker import RETRY_DELAY_S, Broker
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.messages import InfererEntry, encode

REFRESH_S = 1.0

log = logger()


@asynccontextmanager
async def presence(
    broker: Broker, describe: Callable[[], InfererEntry]
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Keep the entry that ``describe`` returns alive during the block, remove it at its end.

    Enters once the entry is stored, which is when gateways can know of this inferer. Gives a
    function that stores it anew at once.
    """
    subject = subjects.inferer(describe().id)
    told = False
    while not await _put(broker, subject, describe()):
        if broker.is_connected and not told:
            told = True
            log.warning("topology_missing", hint="start a gateway, or run: sluice topology apply")
        await asyncio.sleep(RETRY_DELAY_S)

    async def tell() -> None:
        await _put(broker, subject, describe())

    refresh = asyncio.create_task(_refresh(tell))
    try:
        yield tell
    finally:
        refresh.cancel()
        await _put(broker, subject, None)


async def _refresh(tell: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        await tell()


async def _put(broker: Broker, subject: str, entry: InfererEntry | None) -> bool:
    """Store the entry, or a marker that it is gone; whether the broker confirmed it."""
    payload, headers = (b"", {"KV-Operation": "DEL"}) if entry is None else (encode(entry), {})
    if not broker.is_connected:
        return False
    try:
        await broker.publish_stored(subject, payload, headers, patience_s=0)
    except BrokerUnavailable:
        return False
    return True
