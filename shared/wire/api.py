"""What clients send to a gateway and get from it, over HTTP and over NATS."""

from typing import Annotated, Literal, Self

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.retention import MAX_JOB_LIFETIME
from shared.wire.fields import NO_METADATA, Metadata, check_times
from shared.wire.inferers import Concurrency, ConcurrencyChange, InfererEntry
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import Messages, Priority, Prompt, Sampling, Task
from shared.wire.results import (
    Cancelled,
    Completed,
    DeadLetter,
    Expired,
    Failed,
    FinishReason,
    Outcome,
    Result,
    Timings,
    Usage,
)

TaskState = Literal["PENDING", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED"]
"""Celery's names, for users who come from Celery."""
TimeoutS = Annotated[
    float,
    Meta(
        gt=0,
        le=MAX_JOB_LIFETIME.total_seconds(),
        description="Seconds from acceptance to the latest end.",
    ),
]


CLI_USER_AGENT = "sluice-cli/"
"""What the ``User-Agent`` of the command line begins with."""


class JobSubmission(
    Sampling, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What ``POST /jobs`` and the NATS endpoints take."""

    model: str | None = None
    messages: Messages | None = None
    prompt: Prompt | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority = "normal"
    metadata: Metadata | UnsetType = UNSET

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "":  # some clients send it for no model
            msgspec.structs.force_setattr(self, "model", None)
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, and not both")

    @property
    def task(self) -> Task:
        return "complete" if self.messages is None else "chat"


class NatsSubmission(
    JobSubmission, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    stream: bool = False


class DeadLetterHead(Struct, frozen=True, kw_only=True):
    """A dead letter in a list: all but its request."""

    id: str
    model: str
    code: str
    message: str
    attempts: int
    at: str
    priority: Priority = "normal"
    retry_of: str | None = None

    def __post_init__(self) -> None:
        check_times(self.at)

    @classmethod
    def of(cls, letter: DeadLetter) -> Self:
        return cls(**{name: getattr(letter, name) for name in cls.__struct_fields__})


class DeadLetterPage(Struct, frozen=True, kw_only=True):
    """The newest first. ``before`` asks for the next page; None on the last."""

    letters: list[DeadLetterHead]
    before: int | None


class AssistantMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"


class JobResult(Struct, frozen=True, kw_only=True):
    text: str
    finish_reason: FinishReason
    usage: Usage
    message: AssistantMessage | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class JobError(Struct, frozen=True):
    code: str
    message: str


CELERY_STATES: dict[type[Outcome], TaskState] = {
    Completed: "SUCCESS",
    Failed: "FAILURE",
    Cancelled: "REVOKED",
    Expired: "FAILURE",
}


class Progress(Struct, frozen=True):
    """How far a running job is, as of its inferer's last heartbeat, at most a second ago."""

    completion_tokens: int
    max_tokens: int


class Eta(Struct, frozen=True):
    """When a job will be done: within ``p50_s`` seconds with a probability of 50 %, within
    ``p90_s`` with 90 %; ``at`` is the time of the former."""

    p50_s: float
    p90_s: float
    at: str


class JobStatus(Struct, frozen=True, kw_only=True):
    """``position`` counts the jobs that will be served before this one, ``progress`` how far it
    is; ``eta`` is left out while nothing has been measured or no inferer serves the model.
    ``retry_of`` is the job whose dead letter was sent again as this one."""

    id: str
    state: TaskState
    model: str
    attempts: int
    inferer: str | None
    queued_at: str
    started_at: str | None
    finished_at: str | None
    result: JobResult | None
    error: JobError | None
    timings: Timings | None
    metadata: Metadata | UnsetType = UNSET
    priority: Priority = "normal"
    retry_of: str | UnsetType = UNSET
    position: int | UnsetType = UNSET
    progress: Progress | UnsetType = UNSET
    eta: Eta | UnsetType = UNSET

    @classmethod
    def of(cls, outcome: Result) -> Self:
        """How a finished job is shown."""
        result, error = None, None
        if isinstance(outcome, Completed):
            result = JobResult(
                text=outcome.text,
                finish_reason=outcome.finish_reason,
                usage=outcome.usage,
                message=AssistantMessage(outcome.text) if outcome.task == "chat" else UNSET,
                logprobs=UNSET if outcome.logprobs is None else outcome.logprobs,
            )
        else:
            error = JobError(code=outcome.code, message=outcome.message)
        return cls(
            id=outcome.id,
            state=CELERY_STATES[type(outcome)],
            model=outcome.model,
            attempts=outcome.attempt,
            inferer=outcome.inferer,
            queued_at=outcome.queued_at,
            started_at=outcome.started_at,
            finished_at=outcome.finished_at,
            result=result,
            error=error,
            timings=outcome.timings,
            metadata=outcome.metadata or NO_METADATA,
            priority=outcome.priority,
            retry_of=outcome.retry_of or UNSET,
        )


class JobAccepted(Struct, frozen=True, kw_only=True):
    id: str
    state: TaskState
    status_url: str
    events_url: str
    retry_of: str | UnsetType = UNSET
    """The job whose dead letter was sent again as this one."""

    @classmethod
    def of(
        cls, job_id: str, state: TaskState = "PENDING", retry_of: str | UnsetType = UNSET
    ) -> Self:
        return cls(
            id=job_id,
            state=state,
            status_url=f"/status/{job_id}",
            events_url=f"/jobs/{job_id}/events",
            retry_of=retry_of,
        )


class ClassQueue(Struct, frozen=True, kw_only=True):
    waiting: int
    in_flight: int


class ModelQueue(Struct, frozen=True, kw_only=True):
    """One model's queue. ``limit`` is ``max_ack_pending`` of each of its consumers, one per
    priority."""

    model: str
    waiting: int
    in_flight: int
    limit: int
    inferers: int
    oldest_s: float | None
    max_waiting: int = 0
    """How many jobs may wait; further ones are refused. 0 if it is not known."""
    classes: dict[str, ClassQueue] = {}


class QueueReport(Struct, frozen=True):
    models: list[ModelQueue]


class FleetReport(Struct, frozen=True):
    """Every live inferer, as of its last heartbeat, at most two seconds ago; ``at`` is the broker's
    time of the report, for comparison with the times in it."""

    inferers: list[InfererEntry]
    at: str | None = None


class ConcurrencyRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``PUT /concurrency`` takes: for one inferer, for those of a model, or for all."""

    concurrency: Concurrency
    model: str | None = None
    inferer: str | None = None


class ConcurrencyReport(Struct, frozen=True):
    inferers: list[ConcurrencyChange]


class JobReference(Struct, frozen=True, forbid_unknown_fields=True):
    id: str
