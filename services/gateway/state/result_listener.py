"""Announcements of results: one subscription for everybody who waits on this gateway."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from nats.aio.msg import Msg

from shared.background import keep_running
from shared.broker.connection import Broker
from shared.broker.results import decode_stored, read_result
from shared.errors import BrokerUnavailable
from shared.job_ids import is_job_id
from shared.logs import logger
from shared.wire import subjects
from shared.wire.results import Result

MOST_UNREAD = 10_000
"""Further announcements are dropped: waiting requests also poll every few seconds."""
BATCH = 200
BATCH_BYTES = 8 * 1024 * 1024

Announcement = asyncio.Future[Result | None]
"""Resolves to the stored result, or to None when one may have been missed: look it up then."""

log = logger()


class FinishedJobs:
    """Passes each stored result to the requests that wait for it.

    The announcement only says which result to read: any client that may publish can forge one.
    """

    def __init__(self, broker: Broker, learn: Callable[[Result], None]) -> None:
        """``learn`` is called with every result, also if no request waits for it."""
        self._broker = broker
        self._learn = learn
        self._expected: dict[str, set[Announcement]] = {}
        self._unread: dict[str, None] = {}
        """Ids of announced jobs, in their order."""
        self._arrived = asyncio.Event()
        broker.on_reconnect(self.look_again)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        await self._broker.nc.subscribe(subjects.FINISHED_WILDCARD, cb=self._receive)
        reading = keep_running(self._read, "read finished jobs")
        try:
            yield
        finally:
            reading.cancel()

    @contextmanager
    def expecting(self, job_id: str) -> Iterator[Announcement]:
        """The next announcement of this job. Look for the result inside the block: then wait."""
        announcement: Announcement = asyncio.get_running_loop().create_future()
        waiting = self._expected.setdefault(job_id, set())
        waiting.add(announcement)
        try:
            yield announcement
        finally:
            waiting.discard(announcement)
            if not waiting:
                self._expected.pop(job_id, None)

    async def _receive(self, message: Msg) -> None:
        job_id = subjects.last_token(message.subject)
        if is_job_id(job_id) and len(self._unread) < MOST_UNREAD:
            self._unread[job_id] = None
            self._arrived.set()

    async def _read(self) -> None:
        while True:
            await self._arrived.wait()
            batch = list(self._unread)[:BATCH]
            for job_id in batch:
                del self._unread[job_id]
            if not self._unread:
                self._arrived.clear()
            try:
                await self._read_batch(batch)
            except Exception as error:
                if not isinstance(error, BrokerUnavailable):
                    log.exception("results_not_read")
                for job_id in batch:
                    self._resolve(job_id, None)

    async def _read_batch(self, job_ids: list[str]) -> None:
        found = await self._broker.direct_get_all(
            subjects.RESULTS,
            multi_last=[subjects.result(job_id) for job_id in job_ids],
            max_bytes=BATCH_BYTES,
        )
        missing = dict.fromkeys(job_ids)
        for stored in found:
            job_id = subjects.last_token(stored.subject)
            missing.pop(job_id, None)
            result = decode_stored(job_id, stored.data, self._broker.now())
            self._resolve(job_id, result)
            self._learn(result)
        for job_id in missing:
            # Forged; or stored so lately that a replica does not have it yet.
            if job_id in self._expected:
                result_at_leader = await read_result(self._broker, job_id, from_leader=True)
                if result_at_leader is not None:
                    self._resolve(job_id, result_at_leader)

    def look_again(self) -> None:
        """Let all waiting requests look up their result: an announcement may be missed, or the job
        gone."""
        for job_id in list(self._expected):
            self._resolve(job_id, None)

    def _resolve(self, job_id: str, result: Result | None) -> None:
        for announcement in self._expected.get(job_id, ()):
            if not announcement.done():
                announcement.set_result(result)
