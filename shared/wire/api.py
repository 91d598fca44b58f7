"""What clients send to a gateway and get from it, over HTTP and over NATS."""

from typing import Annotated, Literal, Self

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.answers.calls import tool_call
from shared.answers.reader import read_answer
from shared.retention import MAX_JOB_LIFETIME
from shared.wire.answers import PLAIN
from shared.wire.fields import NO_METADATA, Metadata, check_times
from shared.wire.inferers import Concurrency, ConcurrencyChange, InfererEntry
from shared.wire.inputs import AnyDocuments, AnyInput, Text, Texts, TopN, inputs_of, texts_of
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import TEXT_TASKS, ModelRequest, Priority, Task, check_options
from shared.wire.results import (
    Cancelled,
    Choice,
    Completed,
    DeadLetter,
    Expired,
    Failed,
    FinishReason,
    Outcome,
    RankedDocument,
    Result,
    Timings,
    Usage,
)
from shared.wire.strict import StrictFormat, StrictMessages, StrictToolChoice, StrictTools
from shared.wire.tools import ToolCall

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


class Submission(ModelRequest, frozen=True, kw_only=True, omit_defaults=True):
    """A job to be accepted. ``messages``, ``prompt``, ``input`` or ``query`` with ``documents`` say
    what is asked of the model."""

    model: str | None = None
    """Required if several models are served."""
    input: AnyInput | None = None
    """A text, tokens, or a list of either, to compute embeddings of."""
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """The length of the embeddings; only the model's own is possible."""
    query: Text | None = None
    """The text for which `documents` are ranked."""
    documents: AnyDocuments | None = None
    """Texts to rank by their relevance to `query`."""
    top_n: TopN | None = None
    """Return only this many of the best documents."""
    return_documents: bool = False
    """Whether the ranking contains the texts."""
    timeout_s: TimeoutS | None = None
    """The job must end within this many seconds after it was accepted."""
    priority: Priority = "normal"
    """`high` jobs run first, `low` ones last."""
    metadata: Metadata | UnsetType = UNSET
    """Any JSON object of up to 16 kB. It is returned in the status and the result, and jobs can be
    found by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "":  # some clients send it for no model
            msgspec.structs.force_setattr(self, "model", None)
        asked = [self.messages, self.prompt, self.prompt_tokens, self.input, self.query]
        if sum(one is not None for one in asked) != 1:
            raise ValueError(
                "give exactly one of `messages`, `prompt`, `prompt_tokens`, `input` and `query`"
            )
        if (self.query is None) != (self.documents is None):
            raise ValueError("give `query` and `documents` together")
        if self.dimensions is not None and self.input is None:
            raise ValueError("`dimensions` applies only to `input`; leave it out")
        check_options(self.task, self, self.top_n, self.return_documents)
        if self.input is not None:
            msgspec.structs.force_setattr(self, "input", inputs_of(self.input))
        if self.documents is not None:
            msgspec.structs.force_setattr(self, "documents", texts_of(self.documents))

    @property
    def keeps_request(self) -> bool:
        """Whether a copy of the request may be kept after the job has ended."""
        return True

    @property
    def texts(self) -> Texts:
        """The documents as texts; none if there are no documents."""
        return texts_of(self.documents or [])

    @property
    def task(self) -> Task:
        if self.input is not None:
            return "embed"
        if self.query is not None:
            return "rerank"
        return "complete" if self.messages is None else "chat"


class JobSubmission(
    Submission, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What ``POST /jobs`` and the NATS endpoints take."""

    messages: StrictMessages | None = None
    tools: StrictTools | None = None
    tool_choice: StrictToolChoice = "auto"
    response_format: StrictFormat | None = None


class NatsSubmission(
    JobSubmission, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    stream: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.task not in TEXT_TASKS:
            raise ValueError("`stream` applies only to text that is generated; leave it out")


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
    """``content`` is null if the model only called tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET

    @classmethod
    def of(cls, completed: Completed, index: int, choice: Choice) -> Self:
        """What the text of ``choice`` says, the answer ``index`` of a job."""
        read = read_answer(choice.text, completed.format or PLAIN)
        calls = [
            tool_call(call, completed.id, number, index) for number, call in enumerate(read.calls)
        ]
        return cls(
            content=None if calls and not read.content else read.content,
            reasoning_content=read.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )


class JobChoice(Struct, frozen=True, kw_only=True):
    """One answer. ``text`` is what the model wrote, with the marks of its reasoning and its tool
    calls; ``message`` is what that means."""

    text: str
    finish_reason: FinishReason | Literal["tool_calls"]
    message: AssistantMessage | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET

    @classmethod
    def all_of(cls, completed: Completed) -> list[Self]:
        """The choices of a job, in order."""
        found = []
        for index, choice in enumerate(completed.choices):
            message: AssistantMessage | UnsetType = UNSET
            reason: FinishReason | Literal["tool_calls"] = choice.finish_reason
            if completed.task == "chat":
                message = AssistantMessage.of(completed, index, choice)
                if message.tool_calls is not UNSET and reason == "stop":
                    reason = "tool_calls"
            found.append(
                cls(
                    text=choice.text,
                    finish_reason=reason,
                    message=message,
                    logprobs=UNSET if choice.logprobs is None else choice.logprobs,
                )
            )
        return found


class JobResult(Struct, frozen=True, kw_only=True):
    """A text, embeddings (each as base64 of little-endian 32-bit floats) or ranked documents.

    ``text`` is what the model wrote, with the marks of its reasoning and its tool calls;
    ``message`` is what that means. Of several answers these are the first, and ``choices`` has
    all.
    """

    text: str | UnsetType = UNSET
    finish_reason: FinishReason | Literal["tool_calls"] | UnsetType = UNSET
    usage: Usage
    message: AssistantMessage | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    choices: list[JobChoice] | UnsetType = UNSET
    embeddings: list[bytes] | UnsetType = UNSET
    ranking: list[RankedDocument] | UnsetType = UNSET

    @classmethod
    def of(cls, completed: Completed) -> Self:
        if completed.embeddings is not None:
            return cls(usage=completed.usage, embeddings=completed.embeddings)
        if completed.ranking is not None:
            return cls(usage=completed.usage, ranking=completed.ranking)
        choices = JobChoice.all_of(completed)
        return cls(
            text=choices[0].text,
            finish_reason=choices[0].finish_reason,
            usage=completed.usage,
            message=choices[0].message,
            logprobs=choices[0].logprobs,
            choices=choices if len(choices) > 1 else UNSET,
        )


class JobError(Struct, frozen=True):
    """``param`` names the invalid field of the job, if there is one."""

    code: str
    message: str
    param: str | UnsetType = UNSET

    @classmethod
    def of(cls, outcome: Failed | Cancelled | Expired) -> Self:
        param = outcome.param if isinstance(outcome, Failed) else None
        return cls(outcome.code, outcome.message, param or UNSET)


CELERY_STATES: dict[type[Outcome], TaskState] = {
    Completed: "SUCCESS",
    Failed: "FAILURE",
    Cancelled: "REVOKED",
    Expired: "FAILURE",
}


class Progress(Struct, frozen=True):
    """How far a running job is, as of its inferer's last heartbeat, at most a second ago.
    ``prompt_tokens_left`` is how many tokens of the prompt are still to be computed; left out if
    that is not known."""

    completion_tokens: int
    max_tokens: int
    prompt_tokens_left: int | UnsetType = UNSET


class Eta(Struct, frozen=True):
    """When a job will be done: within ``p50_s`` seconds with a probability of 50 %, within
    ``p90_s`` with 90 %; ``at`` is the time of the former."""

    p50_s: float
    p90_s: float
    at: str


class JobStatus(Struct, frozen=True, kw_only=True):
    """``position`` counts the jobs that will be served before this one, ``progress`` how far it
    is; ``eta`` is left out while nothing has been measured or no inferer serves the model.
    ``blocked_reason`` says why no inferer can start the job at present, and what to do about it.
    ``last_error`` is what went wrong in the last attempt of a job in state RETRY. ``retry_of`` is
    the job whose dead letter was sent again as this one."""

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
    blocked_reason: str | UnsetType = UNSET
    last_error: JobError | UnsetType = UNSET

    @classmethod
    def of(cls, outcome: Result) -> Self:
        """How a finished job is shown."""
        result, error = None, None
        if isinstance(outcome, Completed):
            result = JobResult.of(outcome)
        else:
            error = JobError.of(outcome)
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
    priority, and at least 1; ``slots`` are the open ones of its live inferers."""

    model: str
    waiting: int
    in_flight: int
    limit: int
    inferers: int
    oldest_s: float | None
    slots: int | None = None
    """Null from gateways of earlier versions."""
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
