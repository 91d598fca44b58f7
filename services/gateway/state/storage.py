"""The broker's storage: results need room too, so jobs are refused before it is full."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from shared.broker.connection import Broker
from shared.broker.storage import SHORT_SHARE, StorageUse, read_storage, read_write_errors
from shared.errors import StorageShort
from shared.logs import logger

GATEWAYS = 4
"""How many gateways may be about to store as much as this one without filling the storage: what
they publish at the same moment is not in the broker's figures yet."""

READ_IDLE_EVERY_S = 30.0
"""Others may use the storage, too."""

OVERHEAD_BYTES = 512
"""Of a stored message: its subject, its headers and the broker's own."""

SUFFICIENT = "storage_sufficient"

log = logger()


class Storage:
    """Whether there is room for more jobs, as of the last refresh, and of what this gateway has
    published since. While jobs come or run the refresh is at most a few seconds ago."""

    def __init__(self, broker: Broker, replicas: int) -> None:
        self._broker = broker
        self._replicas = replicas
        self._use = StorageUse(0, None)
        self._write_errors: dict[str, str] = {}
        # Bytes whose publish has begun, those whose publish has ended, and those of the latter that
        # had ended before the last refresh.
        self._begun = 0
        self._done = 0
        self._seen = 0
        self._read_at = -math.inf
        self._one_at_a_time = asyncio.Lock()

    async def refresh(self) -> None:
        """Raises: BrokerUnavailable: no answer."""
        before = self._state
        await self._read_use()
        self._write_errors = await read_write_errors(self._broker, self._replicas)
        if self._state != before:
            log.warning(
                self._state,
                used=self._use.used,
                limit=self._use.limit,
                write_errors=self._write_errors,
            )

    async def follow(self, is_active: bool) -> None:
        """Refresh while something may be written, ``is_active`` or by this gateway, and while
        storage is short or unwritable. Else only the use is read, now and then: the broker fails to
        write a stream only after somebody has tried.

        Raises:
            BrokerUnavailable: no answer.
        """
        if is_active or self._unseen or self._state != SUFFICIENT:
            await self.refresh()
        elif time.monotonic() - self._read_at > READ_IDLE_EVERY_S:
            await self._read_use()

    def require_writable(self) -> None:
        """Raises: StorageShort: nothing can be stored any more, not even a result."""
        for stream, error in self._write_errors.items():
            raise StorageShort(
                f"the broker cannot write {stream} ({error}); free space on its disk, then restart "
                "nats-server: see sluice doctor"
            )

    def require_room(self) -> None:
        """Raises: StorageShort: too much of the storage is used to accept another job."""
        self.require_writable()
        if self._use.is_short:
            raise StorageShort(
                f"the broker's storage is {self._use.share:.0%} full; new jobs are refused "
                f"above {SHORT_SHARE:.0%}"
            )

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncIterator[None]:
        """Reserve room for a job of ``size`` bytes, which the block publishes. If room is short,
        jobs are published one after another, each after its own refresh.

        Raises:
            StorageShort: the storage is too full for it.
            BrokerUnavailable: no answer.
        """
        size = (size + OVERHEAD_BYTES) * self._replicas
        if self._fits(GATEWAYS * (self._unseen + size)):
            with self._counted(size):
                yield
            return
        async with self._one_at_a_time:
            await self._read_use()
            if not self._fits(self._unseen + size):
                raise StorageShort(
                    f"the broker's storage is {self._use.share:.0%} full and has no room for this "
                    f"request below {SHORT_SHARE:.0%}; send a smaller one, or try again"
                )
            with self._counted(size):
                yield

    async def _read_use(self) -> None:
        done = self._done
        self._use = await read_storage(self._broker)
        self._seen, self._read_at = done, time.monotonic()

    @contextmanager
    def _counted(self, size: int) -> Iterator[None]:
        self._begun += size
        try:
            yield
        finally:
            self._done += size

    @property
    def _unseen(self) -> int:
        """Bytes that may not be in the broker's figures yet."""
        return self._begun - self._seen

    def _fits(self, size: int) -> bool:
        return not StorageUse(self._use.used + size, self._use.limit).is_short

    @property
    def _state(self) -> str:
        if self._write_errors:
            return "storage_unwritable"
        return "storage_short" if self._use.is_short else SUFFICIENT
