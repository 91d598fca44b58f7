"""A job that has no result yet, as the queue and its events show it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from msgspec import UNSET, UnsetType

from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.model_names import name_of
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import decode_request, decode_state_event, skip
from shared.wire.events import StateEvent
from shared.wire.fields import NO_METADATA
from shared.wire.requests import InferenceRequest, Priority, priority_of
from shared.wire.results import Cancelled, Expired, StopCode, stopped
from shared.wire.trace import Trace, trace_of

Get = Callable[..., Awaitable[StoredMessage | None]]
MayHaveStarted = Callable[[subjects.RequestSubject, StoredMessage], Awaitable[bool]]

OVERDUE = timedelta(seconds=15)
"""A started job that is this long past its deadline has lost its inferer."""


@dataclass(frozen=True)
class PendingJob:
    """A job that waits, runs, or is to be tried again."""

    id: str
    model: str
    priority: Priority
    owner: str
    message: StoredMessage
    request: InferenceRequest | None
    """None where the message is not a request: it was put there by hand."""
    deadline: datetime | None
    last: StateEvent | None
    scheduled: bool

    def is_late(self, now: datetime) -> bool:
        """Whether its deadline has passed; ``now`` is the broker's time, as the deadline is."""
        if self.deadline is None:
            return False
        grace = OVERDUE if self._start else timedelta(0)
        return now - grace > self.deadline

    @property
    def queued_at(self) -> str:
        if self.request is not None and self.request.queued_at is not None:
            return self.request.queued_at
        return timestamp(parse_timestamp(self.message.time))

    @property
    def attempts(self) -> int:
        if self.last is None:
            return 0
        return self.last.attempt - (self.last.state == "returned")

    @property
    def reply_to(self) -> str | None:
        return self.message.headers.get(subjects.HEADER_REPLY_TO)

    @property
    def trace(self) -> Trace:
        return trace_of(self.message.headers)

    @property
    def streams(self) -> bool:
        return self.request is not None and self.request.stream

    @property
    def is_running(self) -> bool:
        return self._start is not None

    @property
    def is_retried(self) -> bool:
        """Whether its last attempt failed and the next has not started."""
        return self.scheduled or (
            self.last is not None and (self.last.state == "retrying" or self.last.code is not None)
        )

    def status(self) -> JobStatus:
        return JobStatus(
            id=self.id,
            state="RETRY" if self.is_retried else "STARTED" if self.is_running else "PENDING",
            model=self.model,
            attempts=self.attempts,
            inferer=self._start.inferer if self._start else None,
            queued_at=self.queued_at,
            started_at=self._start.at if self._start else None,
            finished_at=None,
            result=None,
            error=None,
            timings=None,
            metadata=(self.request and self.request.metadata) or NO_METADATA,
            priority=self.priority,
            retry_of=(self.request and self.request.retry_of) or UNSET,
            last_error=self._last_error,
        )

    @property
    def lateness(self) -> StopCode:
        """The code of a job that ``is_late``."""
        return "timed_out" if self._start else "deadline_passed"

    def stopped(self, code: StopCode, now: datetime) -> Cancelled | Expired:
        """The result of a job that somebody or something stops now."""
        return stopped(
            code,
            id=self.id,
            model=self.model,
            attempt=self.attempts,
            queued_at=self.queued_at,
            started_at=self._start.at if self._start else None,
            finished_at=timestamp(now),
            inferer=self._start.inferer if self._start else None,
            owner=self.owner,
            metadata=self.request.metadata if self.request else UNSET,
            priority=self.priority,
            retry_of=self.request.retry_of if self.request else None,
            via=self.request.via if self.request else None,
            preview=self.request.preview if self.request else "",
            response=self.request.response if self.request else None,
        )

    @property
    def _last_error(self) -> JobError | UnsetType:
        if self.last is None or self.last.code is None:
            return UNSET
        return JobError(self.last.code, self.last.message or "")

    @property
    def _start(self) -> StateEvent | None:
        """The `started` event of the running attempt; None if it does not run."""
        last = self.last
        return last if last is not None and last.state == "started" and not last.code else None


async def find_pending_job(
    broker: Broker,
    job_id: str,
    *,
    from_leader: bool = False,
    may_have_started: MayHaveStarted | None = None,
) -> PendingJob | None:
    """The job as it waits or runs; None when the queue does not hold it. A replica may not hold
    it yet. A job that ``may_have_started`` rules out has no state, which is not read.

    Raises:
        BrokerUnavailable: no answer.
    """
    get = broker.leader_get if from_leader else broker.direct_get
    message = await find_message(get, job_id)
    if message is None:
        return None
    try:
        subject = subjects.RequestSubject.parse(message.subject)
    except ValueError:
        return None  # nothing can be stored for it
    last = None
    if may_have_started is None or await may_have_started(subject, message):
        last = await get(subjects.STATES, last_by_subj=subjects.state(subject.model, job_id))
    # Its inferer says what is wrong with a request that cannot be read.
    request, deadline = decode_request.read(message.data, message.subject), None
    try:
        if (text := message.headers.get(subjects.HEADER_DEADLINE)) is not None:
            deadline = parse_timestamp(text)
    except ValueError as error:
        skip("deadline", message.subject, error)
        request = None
    last_event = None if last is None else decode_state_event.read(last.data, last.subject)
    return PendingJob(
        id=job_id,
        model=name_of(subject.model, request.model if request else None),
        priority=priority_of(subject.priority),
        owner=subject.owner,
        message=message,
        request=request,
        deadline=deadline,
        last=last_event,
        scheduled=subject.is_scheduled,
    )


async def find_message(get: Get, job_id: str) -> StoredMessage | None:
    """The request on the queue, or in its schedule. The queue is read a second time, because the
    request may have moved: it is scheduled before it leaves the queue, and returns in one step."""
    queue, schedule = subjects.request_of(job_id), subjects.schedule_of(job_id)
    for place in (queue, schedule, queue):
        message = await get(subjects.REQUESTS, last_by_subj=place)
        if message is not None:
            return message
    return None
