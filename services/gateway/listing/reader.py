"""Keeps an index of jobs as the streams are: it reads them from where it stopped, again and again.

No announcements are needed, so none can be missed or forged; and a gateway that has just started
knows what the others know.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import msgspec
import nats.js.errors
from msgspec import Struct
from nats.js.api import StreamInfo

from services.gateway.eta.position import QueuedJob
from services.gateway.listing.index import JobIndex
from shared.background import drop, keep_running
from shared.broker.connection import REQUEST_TIMEOUT_S, Broker, unavailable_on_outage
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.listing import JobPage, JobQuery

READ_EVERY_S = 1.0
"""How often the streams are read without a request for a list. A request reads them at once."""
COMPARE_EVERY_S = 30.0
"""How often the index is compared with what the streams hold."""
CATCH_UP_S = 1.0
"""How long a list waits for what was stored just now."""
READ_AGAIN = 1000
"""Messages that are read again after a reconnect: a broker that was killed may have lost the last
ones, and others have their sequences."""
SETTLED = timedelta(seconds=30)
"""How old a job must be to be called deleted: it may be on its way from the queue to its result."""

BATCH = 100
"""Messages of a page: of more, decoding would hold the event loop for too long."""
BATCH_BYTES = 1024 * 1024

EVERY_REQUEST = "infer.*.*.*.*.*"
"""On the queue, or scheduled for a retry."""

T = TypeVar("T")
log = logger()


@dataclass
class Followed:
    """A stream, and how far it was read."""

    stream: str
    wildcard: str
    add: Callable[[Iterable[StoredMessage]], None]
    sequence: int = 0
    is_begun: bool = False
    created: datetime | None = None


class JobLister:
    """Answers which jobs there are."""

    def __init__(self, broker: Broker, max_jobs: int) -> None:
        self._broker = broker
        self._max_jobs = max_jobs
        self._index = JobIndex(max_jobs)
        # One thread, so that the table is used by one at a time.
        self._thread = ThreadPoolExecutor(1, "job index")
        self._requests = Followed(subjects.REQUESTS, EVERY_REQUEST, self._index.add_requests)
        self._states = Followed(subjects.STATES, subjects.STATES_WILDCARD, self._index.set_states)
        self._results = Followed(
            subjects.RESULTS, subjects.RESULTS_WILDCARD, self._index.add_results
        )
        # In this order: a state is of a job that is known, and a result ends both.
        self._followed = (self._requests, self._states, self._results)
        self._reading = asyncio.Lock()
        self._next_read: asyncio.Task[None] | None = None
        self._was_away = False
        self._has_begun = False
        """Whether everything was read that there was at the start."""
        broker.on_reconnect(self._on_reconnect)

    @property
    def is_complete(self) -> bool:
        """Whether all jobs that wait or run are known."""
        return self._has_begun and not self._index.has_forgotten

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read in the background until the end of the block."""
        reading = keep_running(self._keep_reading, "read the list of jobs")
        try:
            yield
        finally:
            drop(reading)
            if self._next_read is not None:
                drop(self._next_read)
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def page(self, query: JobQuery) -> JobPage:
        """A page of jobs, with all that the broker held when this was called.

        Raises:
            InvalidRequest: the cursor is not one of such a list.
            BrokerUnavailable: no answer.
        """
        await self._catch_up()
        return await self._in_thread(lambda: self._index.page(query, self.is_complete))

    async def queued(
        self, job_ids: Collection[str], models: Collection[ModelConsumers]
    ) -> list[QueuedJob]:
        """See `Queues.find`."""
        return await self._in_thread(lambda: self._index.queued(job_ids, models))

    async def first_queued(self, model: ModelConsumers, limit: int) -> list[QueuedJob]:
        """See `Queues.first`."""
        return await self._in_thread(lambda: self._index.first_queued(model, limit))

    async def late(self, overdue: timedelta) -> list[str]:
        """The ids of jobs whose deadlines have passed; of running ones by ``overdue``."""
        now = self._broker.now()
        return await self._in_thread(
            lambda: self._index.late(timestamp(now), timestamp(now - overdue))
        )

    async def _catch_up(self) -> None:
        if not self._has_begun:
            return  # that takes seconds, and the answer says so
        if self._next_read is None:
            self._next_read = asyncio.create_task(self._read_next(), name="catch up")
            # Also if nobody waits for it any more.
            self._next_read.add_done_callback(lambda task: task.cancelled() or task.exception())
        reading = self._next_read
        await asyncio.wait((reading,), timeout=CATCH_UP_S)
        if reading.done():
            reading.result()

    async def _read_next(self) -> None:
        try:
            async with self._reading:
                # A request that arrives from now on needs another read.
                self._next_read = None
                await self._read()
        except nats.js.errors.Error as error:
            raise BrokerUnavailable(f"the streams could not be read: {error}") from error

    async def _keep_reading(self) -> None:
        loop = asyncio.get_running_loop()
        compared_at = loop.time()
        is_failing = False
        while True:
            try:
                async with self._reading:
                    await self._read()
                    is_failing = False
                    if not self._has_begun:
                        self._has_begun = True
                        log.info("jobs_listed")
                    if loop.time() - compared_at > COMPARE_EVERY_S:
                        compared_at = loop.time()
                        await self._compare()
            except (BrokerUnavailable, nats.js.errors.Error) as error:
                if not is_failing:
                    log.warning("jobs_not_listed", error=str(error))
                is_failing = True
            await asyncio.sleep(READ_EVERY_S)

    async def _read(self) -> None:
        """Add what was stored since the last time."""
        if self._was_away:
            self._was_away = False
            for followed in self._followed:
                followed.sequence = max(0, followed.sequence - READ_AGAIN)
        for followed in self._followed:
            if not followed.is_begun:
                await self._begin(followed)
                followed.is_begun = True
            while page := await self._broker.direct_get_all(
                followed.stream,
                seq=followed.sequence + 1,
                next_by_subj=followed.wildcard,
                batch=BATCH,
                max_bytes=BATCH_BYTES,
            ):
                await self._in_thread(partial(followed.add, page))
                followed.sequence = page[-1].sequence
                if page[-1].pending_after == 0:
                    break

    async def _begin(self, followed: Followed) -> None:
        """Find where to begin. Of results only as many are read as jobs are listed, of states those
        of jobs that have no result."""
        if followed is self._requests:
            return
        newest = await self._broker.direct_get(followed.stream, last_by_subj=followed.wildcard)
        if newest is None:
            return
        if followed is self._results:
            followed.sequence = max(0, newest.sequence - self._max_jobs)
            return
        followed.sequence = newest.sequence
        names = await self._in_thread(self._index.state_subjects)
        for first in range(0, len(names), BATCH):
            page = await self._broker.direct_get_all(
                followed.stream, multi_last=names[first : first + BATCH]
            )
            await self._in_thread(partial(followed.add, page))

    async def _compare(self) -> None:
        """Forget what the streams do not hold any more, or everything if one is another stream."""
        for followed in self._followed:
            info = await self._info(followed.stream)
            was_created, followed.created = followed.created, info.created
            if was_created not in (None, info.created) or info.state.last_seq < followed.sequence:
                log.warning("stream_replaced", stream=followed.stream)
                await self._in_thread(self._index.clear)
                for one in self._followed:
                    one.sequence, one.is_begun = 0, False
                return
            if followed is self._results:
                await self._in_thread(
                    partial(self._index.drop_results_before, info.state.first_seq)
                )
        await self._drop_deleted()

    async def _drop_deleted(self) -> None:
        before = timestamp(self._broker.now() - SETTLED)
        unfinished = await self._in_thread(lambda: self._index.unfinished(before))
        held = (await self._info(subjects.REQUESTS)).state.messages
        if len(unfinished) <= held:
            return
        there = await self._job_ids()
        gone = [job_id for job_id in unfinished if job_id not in there]
        await self._read()  # they may have ended meanwhile
        await self._in_thread(lambda: self._index.drop_unfinished(gone))

    async def _job_ids(self) -> set[str]:
        """The ids of all jobs without a result that the broker holds."""
        found: set[str] = set()
        count = 0
        with unavailable_on_outage(self._broker):
            while True:
                answer = await self._broker.nc.request(
                    f"$JS.API.STREAM.INFO.{subjects.REQUESTS}",
                    msgspec.json.encode({"subjects_filter": EVERY_REQUEST, "offset": count}),
                    REQUEST_TIMEOUT_S,
                )
                page = _decode_subjects(answer.data)
                names = page.state.subjects or {}
                found.update(name.rpartition(".")[2] for name in names)
                count += len(names)
                if not names or count >= page.total:
                    return found

    async def _info(self, stream: str) -> StreamInfo:
        with unavailable_on_outage(self._broker):
            return await self._broker.js.stream_info(stream)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _on_reconnect(self) -> None:
        self._was_away = True


class _SubjectState(Struct, frozen=True):
    subjects: dict[str, int] | None = None


class _SubjectPage(Struct, frozen=True):
    state: _SubjectState
    total: int = 0


_decode_subjects = msgspec.json.Decoder(_SubjectPage).decode
