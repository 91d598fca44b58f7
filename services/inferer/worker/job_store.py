"""What the broker holds of each job: read and written through outages, however long."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Literal, TypeVar

from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from services.inferer.worker.delivery import Job
from shared.background import drop
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.refusals import TRANSIENT
from shared.broker.results import read_result, send_result, store_letter, store_result
from shared.errors import BrokerUnavailable, StreamRefused
from shared.logs import logger
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_state_event, encode
from shared.wire.events import StateEvent
from shared.wire.requests import RetryRequest
from shared.wire.results import DeadLetter, Result

PATIENCE_S = 2.0
"""How long one call waits for the broker before it is logged and made again."""

LONGEST_PAUSE_S = 5.0
"""Between two calls that a stream refuses."""

ASK_GATEWAY_S = 5.0
"""How long a gateway may take to schedule a retry."""

T = TypeVar("T")
log = logger()


class JobStore:
    """One inferer's access to its jobs on the broker. Outcomes must not be lost, so calls are
    repeated until they succeed, even if somebody has to change a stream first."""

    def __init__(self, broker: Broker, inferer_id: str) -> None:
        self._broker = broker
        self._inferer_id = inferer_id

    async def result(self, job: Job) -> Result | None:
        """The result that is stored, by this inferer or another process."""
        return await _until_stored(lambda: read_result(self._broker, job.model, job.id))

    async def last_state(self, job: Job) -> StateEvent | None:
        """The job's last state event."""
        stored = await _until_stored(
            lambda: self._broker.subject_get(subjects.STATES, subjects.state(job.model, job.id))
        )
        return None if stored is None else decode_state_event.read(stored.data, stored.subject)

    async def is_scheduled(self, job: Job) -> bool:
        """Whether an earlier delivery of this very message has scheduled a retry."""
        stored = await _until_stored(
            lambda: self._broker.subject_get(subjects.REQUESTS, job.subject.schedule)
        )
        # A message that a schedule has put on the queue is younger than it. A replica that lags
        # may still show that schedule; mistaking it for a new one would lose the job.
        return stored is not None and stored.sequence > job.message.metadata.sequence.stream

    async def announce_start(self, job: Job) -> None:
        """Publish the start. A first one that the stream refuses is left out, which costs one
        attempt at most. Later ones are not: the attempts of a job that kills its inferers would
        never be counted."""
        assert job.started_at is not None
        event = self._event(job, "started", job.started_at)
        try:
            await _until_stored(
                lambda: self._publish_state(job, event, PATIENCE_S),
                if_refused=not job.is_first_delivery,
            )
        except StreamRefused as error:
            log.warning("start_not_announced", job_id=job.id, error=error.message)

    async def announce_retry(self, job: Job, code: str, message: str) -> None:
        """Raises: StreamRefused."""
        event = self._event(job, "retrying", timestamp(self._broker.now()), code, message)
        await _until_stored(lambda: self._publish_state(job, event, PATIENCE_S), if_refused=False)

    async def announce_return_for_later(self, job: Job, code: str, message: str) -> None:
        """Of a job that this inferer cannot run. Raises: StreamRefused."""
        at, returns = timestamp(self._broker.now()), job.returns + 1
        event = self._event(job, "returned", at, code, message, returns)
        await _until_stored(lambda: self._publish_state(job, event, PATIENCE_S), if_refused=False)

    async def announce_return(self, job: Job) -> None:
        """Raises: BrokerUnavailable: after ``PATIENCE_S``; a job that is requeued cannot wait."""
        event = self._event(job, "returned", timestamp(self._broker.now()))
        await self._publish_state(job, event, PATIENCE_S)

    async def schedule(self, job: Job, at: datetime) -> bool:
        """Have a gateway schedule the job's next attempt. Returns whether one did. Inferers do not
        publish to REQUESTS: with permission for that, they could empty every queue.

        Raises:
            StreamRefused: the stream takes no schedules, or not this one.
        """
        wanted = RetryRequest(
            sequence=job.message.metadata.sequence.stream, attempt=job.attempt, at=timestamp(at)
        )
        subject = subjects.retry(job.model, job.id)
        try:
            answer = await self._broker.nc.request(subject, encode(wanted), ASK_GATEWAY_S)
        except TRANSIENT as error:
            log.warning("no_gateway_scheduled", job_id=job.id, error=str(error))
            return False
        headers = answer.headers or {}
        if headers.get(ERROR_CODE_HEADER) is None:
            return True
        why = headers.get(ERROR_HEADER, "")
        if why.startswith(f"{StreamRefused.code}:"):
            raise StreamRefused(why.partition(": ")[2])
        log.warning("retry_not_scheduled", job_id=job.id, error=why)
        return False

    async def store(self, job: Job, result: Result) -> Result:
        """Store ``result`` unless the job has one. Returns the stored one."""
        return await _until_stored(
            lambda: store_result(self._broker, result, PATIENCE_S, job.trace)
        )

    async def reply(self, job: Job, stored: Result) -> None:
        """Send the result to the caller, if one waits for it."""
        stream = job.malformed is None and job.request.stream
        await _until_stored(lambda: send_result(self._broker, stored, job.reply_to, stream))

    async def dead_letter(self, job: Job, letter: DeadLetter) -> DeadLetter:
        """Store ``letter`` unless the job has one. Returns the stored one."""
        return await _until_stored(
            lambda: store_letter(self._broker, letter, PATIENCE_S, job.trace)
        )

    def _event(
        self,
        job: Job,
        state: Literal["started", "returned", "retrying"],
        at: str,
        code: str | None = None,
        message: str | None = None,
        returns: int = 0,
    ) -> StateEvent:
        return StateEvent(
            state=state,
            attempt=job.attempt,
            at=at,
            inferer=self._inferer_id,
            work=job.work,
            code=code,
            message=message,
            returns=returns,
        )

    async def _publish_state(self, job: Job, event: StateEvent, patience_s: float) -> None:
        payload = encode(event)
        message_id = f"{job.id}/{event.state}/{event.attempt}/{event.at}"
        headers = {**job.trace, subjects.HEADER_MSG_ID: message_id}
        storing = asyncio.create_task(
            self._broker.publish_stored(
                subjects.state(job.model, job.id), payload, headers, patience_s
            ),
            name=f"store the state of {job.id}",
        )
        try:
            # Not in a task of its own: what is written here goes out before anything written by
            # tasks created later, such as the one for the tokens.
            is_stored = await self._publish_event(job, payload, headers, patience_s)
            await storing
        finally:
            drop(storing)
        if not is_stored:  # perhaps the broker was away
            await self._publish_event(job, payload, headers, patience_s)

    async def _publish_event(
        self, job: Job, payload: bytes, headers: dict[str, str], patience_s: float
    ) -> bool:
        """Store an event for readers that follow the job; whether it was stored. It may be lost:
        attempts are counted by states, and a stream that does not answer must not stop the
        queue."""
        subject = subjects.state_events(job.model, job.id)
        try:
            await self._broker.publish_stored(subject, payload, headers, patience_s)
        except BrokerUnavailable as error:
            log.warning("event_not_stored", job_id=job.id, error=error.message)
            return False
        return True


async def _until_stored(call: Callable[[], Awaitable[T]], *, if_refused: bool = True) -> T:
    """Repeat ``call`` until the broker answers and has room; and, ``if_refused``, until the stream
    accepts the message."""
    logged, pause_s = False, RETRY_DELAY_S
    while True:
        try:
            return await call()
        except BrokerUnavailable as error:
            if isinstance(error, StreamRefused):
                if not if_refused:
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not logged:
                log.warning("broker_awaited", error=error.message)
                logged = True
            await asyncio.sleep(pause_s)
