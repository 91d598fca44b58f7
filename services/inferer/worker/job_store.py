"""What the broker holds of each job: looked up and written through outages, however long."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Literal, TypeVar

from nats.js.api import PubAck

from services.inferer.worker.delivery import Job
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.results import read_result, send_result, store_result
from shared.errors import BrokerUnavailable, StoredAlready, StreamRefused
from shared.logs import logger
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_dead_letter, decode_state_event, encode
from shared.wire.events import StateEvent
from shared.wire.results import DeadLetter, Result

PATIENCE_S = 2.0
"""How long one call waits for the broker before it is logged and made again."""

LONGEST_PAUSE_S = 5.0
"""Between two calls that a stream refuses."""

T = TypeVar("T")
log = logger()


class Records:
    """One inferer's view; what a job became must not be lost, so calls are made until the broker
    does what they ask, also where somebody has to change a stream before."""

    def __init__(self, broker: Broker, inferer_id: str) -> None:
        self._broker = broker
        self._inferer_id = inferer_id

    async def result(self, job: Job) -> Result | None:
        """The result that is stored, whoever did it."""
        return await _insist(lambda: read_result(self._broker, job.id))

    async def last_state(self, job: Job) -> StateEvent | None:
        """What was last announced of the job."""
        stored = await _insist(
            lambda: self._broker.direct_get(
                subjects.EVENTS, last_by_subj=subjects.state_events(job.id)
            )
        )
        return None if stored is None else decode_state_event.read(stored.data, stored.subject)

    async def is_scheduled(self, job: Job) -> bool:
        """Whether an earlier delivery of this very message has put the job off."""
        stored = await _insist(
            lambda: self._broker.direct_get(
                subjects.REQUESTS, last_by_subj=subjects.schedule_of(job.id)
            )
        )
        # A message that a schedule has put on the queue is younger than it. A replica that lags
        # may still show that schedule; to take it for another one would lose the job.
        return stored is not None and stored.sequence > job.message.metadata.sequence.stream

    async def announce_start(self, job: Job) -> None:
        """A first start that the stream refuses is left out, which costs one attempt at most; later
        ones are not: the attempts of a job that kills its inferers would never be counted."""
        assert job.started_at is not None
        event = self._event(job, "started", job.started_at)
        try:
            await _insist(
                lambda: self._publish_state(job, event, PATIENCE_S),
                if_refused=not job.is_first_delivery,
            )
        except StreamRefused as error:
            log.warning("start_not_announced", job_id=job.id, error=error.message)

    async def announce_retry(self, job: Job, code: str, message: str) -> None:
        """Raises: StreamRefused."""
        event = self._event(job, "retrying", timestamp(self._broker.now()), code, message)
        await _insist(lambda: self._publish_state(job, event, PATIENCE_S), if_refused=False)

    async def announce_return(self, job: Job) -> None:
        """Raises: BrokerUnavailable: after ``PATIENCE_S``; who returns a job is in a hurry."""
        event = self._event(job, "returned", timestamp(self._broker.now()))
        await self._publish_state(job, event, PATIENCE_S)

    async def schedule(self, job: Job, at: datetime) -> None:
        """Have the broker put the request back on the queue then, as it was.

        Raises:
            StreamRefused: the stream takes no schedules, or not this one.
        """
        received = job.message.headers or {}
        kept = {
            name: value
            for name, value in received.items()
            if not name.lower().startswith(subjects.BROKERS_HEADERS)
        }
        # With the id of the request, or that of an earlier schedule, the broker would take it for
        # a repetition and drop it, and the ack that follows would destroy the job. The attempt
        # alone does not make it another: its number may have come from a replica that lags.
        sequence = job.message.metadata.sequence.stream
        headers = {
            **kept,
            subjects.HEADER_MSG_ID: f"{job.id}/{job.attempt}/{sequence}",
            subjects.HEADER_SCHEDULE: f"@at {timestamp(at)}",
            subjects.HEADER_SCHEDULE_TARGET: job.message.subject,
        }
        subject = subjects.schedule(job.model, job.id, job.job_class)
        await _insist(
            lambda: self._broker.publish_stored(subject, job.message.data, headers, PATIENCE_S),
            if_refused=False,
        )

    async def store(self, result: Result) -> Result:
        """Store ``result`` unless the job has one; the one that is stored."""
        return await _insist(lambda: store_result(self._broker, result, PATIENCE_S))

    async def reply(self, job: Job, stored: Result) -> None:
        """Tell who waits for the job, if anybody does."""
        stream = job.malformed is None and job.request.stream
        await _insist(lambda: send_result(self._broker, stored, job.reply_to, stream))

    async def bury(self, letter: DeadLetter) -> DeadLetter:
        """Store ``letter`` unless the job has one; the one that is stored."""
        return await _insist(lambda: self._bury(letter))

    async def _bury(self, letter: DeadLetter) -> DeadLetter:
        subject = subjects.dead(letter.model, letter.id)
        try:
            await self._broker.publish_stored(
                subject, encode(letter), {subjects.HEADER_EXPECTED_LAST: "0"}, PATIENCE_S
            )
        except StoredAlready as error:
            # Whoever wrote it was lost before it could store the result; or it was ourselves, and
            # the confirmation was lost.
            stored = await self._broker.direct_get(subjects.DEAD, last_by_subj=subject)
            if stored is None:
                raise BrokerUnavailable("the dead letter could not be read back yet") from error
            return decode_dead_letter.read(stored.data, subject) or letter
        return letter

    def _event(
        self,
        job: Job,
        state: Literal["started", "returned", "retrying"],
        at: str,
        code: str | None = None,
        message: str | None = None,
    ) -> StateEvent:
        return StateEvent(
            state=state,
            attempt=job.attempt,
            at=at,
            inferer=self._inferer_id,
            work=job.work,
            code=code,
            message=message,
        )

    async def _publish_state(self, job: Job, event: StateEvent, patience_s: float) -> PubAck:
        return await self._broker.publish_stored(
            subjects.state_events(job.id),
            encode(event),
            {subjects.HEADER_MSG_ID: f"{job.id}/{event.state}/{event.attempt}/{event.at}"},
            patience_s,
        )


async def _insist(call: Callable[[], Awaitable[T]], *, if_refused: bool = True) -> T:
    """Make ``call`` until the broker answers and has room; and, ``if_refused``, until the stream
    takes the message."""
    told, pause_s = False, RETRY_DELAY_S
    while True:
        try:
            return await call()
        except BrokerUnavailable as error:
            if isinstance(error, StreamRefused):
                if not if_refused:
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not told:
                log.warning("broker_awaited", error=error.message)
                told = True
            await asyncio.sleep(pause_s)
