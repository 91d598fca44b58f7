"""Announcements of results: one subscription for all requests that wait at this gateway."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from nats.aio.msg import Msg

from shared.background import keep_running
from shared.broker.connection import Broker
from shared.broker.results import decode_stored
from shared.errors import BrokerUnavailable
from shared.job_ids import is_job_id
from shared.logs import logger
from shared.model_names import is_token
from shared.wire import subjects
from shared.wire.results import Result

MOST_UNREAD = 10_000
"""Further announcements are dropped: waiting requests also poll every few seconds."""
BATCH = 200
BATCH_BYTES = 8 * 1024 * 1024
LARGEST_RESULT = 1024 * 1024
READ_AFTER_S = 0.01
"""How long results that nobody waits for may be collected: a read of several costs little more than
that of one."""

Announcement = asyncio.Future[Result | None]
"""Resolves to the stored result, or to None when one may have been missed: read it then."""

log = logger()


class ResultListener:
    """Passes each stored result to the requests that wait for it.

    The announcement only says which result to read: any client that may publish can forge one.
    """

    def __init__(self, broker: Broker, learn: Callable[[Result], None]) -> None:
        """``learn`` is called with every result, also if no request waits for it."""
        self._broker = broker
        self._learn = learn
        self._expected: dict[str, dict[Announcement, bool]] = {}
        """By the subject of a result: the futures to resolve, and whether at once."""
        self._unread: dict[str, None] = {}
        """Subjects of announced results, in their order."""
        self._is_time = asyncio.Event()
        """Set when they are to be read."""
        self._timer: asyncio.TimerHandle | None = None
        broker.on_reconnect(self.read_again)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        await self._broker.nc.subscribe_directly(subjects.FINISHED_WILDCARD, self._receive)
        reading = keep_running(self._read, "read finished jobs")
        try:
            yield
        finally:
            reading.cancel()

    @contextmanager
    def expecting(self, model: str, job_id: str, *, at_once: bool = True) -> Iterator[Announcement]:
        """The next announcement of this job. Read the result inside the block, then wait.
        ``at_once``: without the delay of `READ_AFTER_S`."""
        subject = subjects.result(model, job_id)
        announcement: Announcement = asyncio.get_running_loop().create_future()
        waiting = self._expected.setdefault(subject, {})
        waiting[announcement] = at_once
        try:
            yield announcement
        finally:
            del waiting[announcement]
            if not waiting:
                self._expected.pop(subject, None)

    def _receive(self, message: Msg) -> None:
        model, job_id = subjects.model_and_id(message.subject)
        if is_token(model) and is_job_id(job_id) and len(self._unread) < MOST_UNREAD:
            subject = subjects.result(model, job_id)
            self._unread[subject] = None
            if any(self._expected.get(subject, {}).values()):
                self._is_time.set()
            elif self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(READ_AFTER_S, self._is_time.set)

    async def _read(self) -> None:
        while True:
            await self._is_time.wait()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            batch = list(self._unread)[:BATCH]
            for subject in batch:
                del self._unread[subject]
            if not self._unread:
                self._is_time.clear()
            try:
                await self._read_batch(batch)
            except Exception as error:
                if not isinstance(error, BrokerUnavailable):
                    log.exception("results_not_read")
                for subject in batch:
                    self._resolve(subject, None)

    async def _read_batch(self, batch: list[str]) -> None:
        found = await self._broker.direct_get_all(
            subjects.RESULTS, multi_last=batch, max_bytes=BATCH_BYTES
        )
        missing = dict.fromkeys(batch)
        for stored in found:
            missing.pop(stored.subject, None)
            self._pass_on(stored.subject, stored.data)
        if missing and sum(len(stored.data) for stored in found) > BATCH_BYTES - LARGEST_RESULT:
            # The answer may have been cut there.
            self._unread |= missing
            self._is_time.set()
            return
        for subject in missing:
            # Forged; or stored so recently that a replica does not have it yet.
            if subject in self._expected:
                at_leader = await self._broker.leader_get(subjects.RESULTS, last_by_subj=subject)
                if at_leader is not None:
                    self._pass_on(subject, at_leader.data)

    def _pass_on(self, subject: str, stored: bytes) -> None:
        result = decode_stored(subject, stored, self._broker.now())
        self._resolve(subject, result)
        self._learn(result)

    def read_again(self) -> None:
        """Let all waiting requests read their result: an announcement may be missed, or the job
        gone."""
        for subject in list(self._expected):
            self._resolve(subject, None)

    def _resolve(self, subject: str, result: Result | None) -> None:
        for announcement in self._expected.get(subject, ()):
            if not announcement.done():
                announcement.set_result(result)
