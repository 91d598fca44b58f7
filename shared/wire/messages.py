"""Every payload that crosses a process boundary, version 1 of the wire.

A field that is added later has a default: tests decode the payloads of every earlier version.
Times are RFC 3339 strings of fixed width (`shared/timestamps.py`), durations milliseconds. Whoever
can publish on the broker can put anything there: what later code relies on, the types check.
"""

from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from shared.timestamps import parse_timestamp
from shared.wire.decoding import Decoder

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]

TaskState = Literal["PENDING", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED"]
"""Celery's words, for those who come from there."""

MaxTokens = Annotated[int, Meta(ge=1, le=2**31 - 1, description="Most tokens to generate.")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="0 always takes the likeliest token.")]
Probability = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1, description="0 switches it off.")]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10, description="1 switches it off.")]
StopString = Annotated[str, Meta(min_length=1)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=16)]
TimeoutS = Annotated[
    float, Meta(gt=0, le=86_400, description="Seconds from acceptance to the latest end.")
]
Prompt = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""What a double holds exactly."""
SmallInt = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Milliseconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
"""Some are the difference of two hosts' clocks, and may be negative."""
TokensPerS = Annotated[float, Meta(ge=0, le=1e12)]
InfererId = Annotated[str, Meta(min_length=1, max_length=256)]
"""A part of subjects, whose length the broker bounds."""
Metadata = Annotated[
    Raw,
    Meta(
        description="An object of the caller's own, of 16 kB at most.",
        extra_json_schema={"type": "object"},
    ),
]
"""It travels as bytes, and nothing of ours reads it: 4 MB of ``[[],[],…]`` would be 100 MB of
objects wherever they were decoded."""
NO_METADATA = Raw(b"null")
Priority = Literal["high", "normal", "low"]
"""A job's class: strictly in this order, first in first out within each."""


class TextPart(Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    role: Role
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class PlainText(Struct, frozen=True, tag_field="type", tag="text"):
    """``response_format`` that asks for nothing special."""


class JsonObject(Struct, frozen=True, tag_field="type", tag="json_object"):
    """``response_format`` that asks for any JSON object."""


class NamedSchema(Struct, frozen=True, omit_defaults=True):
    source: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = msgspec.field(
        name="schema"
    )
    """As it was sent: decoded before its size is known it could be hundreds of megabytes."""
    name: str = "response"
    description: str | None = None
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """Raises: ValueError, RecursionError: it cannot be read, or is not an object."""
        return msgspec.json.decode(encode(self.source), type=dict[str, Any])


class JsonSchema(Struct, frozen=True, tag_field="type", tag="json_schema"):
    """``response_format`` that asks for JSON valid under a schema."""

    json_schema: NamedSchema


ResponseFormat = PlainText | JsonObject | JsonSchema


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when to stop. Defaults are llama.cpp's own."""

    max_tokens: MaxTokens | None = None
    temperature: Temperature = 0.8
    top_p: Probability = 0.95
    top_k: TopK = 40
    min_p: Probability = 0.05
    seed: Seed | None = None
    stop: Stop | None = None
    repeat_penalty: RepeatPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    response_format: ResponseFormat | None = None

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class InferenceRequest(Sampling, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a message on ``REQUESTS``. Its id, model and class are in the subject."""

    messages: Messages | None = None
    prompt: Prompt | None = None
    stream: bool = False
    """Whether token frames go to ``Reply-To`` too."""
    queued_at: str | None = None
    owner: str | None = None
    metadata: Metadata | UnsetType = UNSET
    retry_of: str | None = None
    model: str | None = None
    """What users call the model; the subject holds its token."""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, and not both")
        _check_times(self.queued_at)

    def work(self, n_ctx: int) -> "Work":
        """How much there is to do for a model with ``n_ctx`` tokens of context."""
        texts = [self.prompt or "", *(message.text for message in self.messages or [])]
        return Work(
            prompt_bytes=sum(len(text.encode("utf-8")) for text in texts),
            max_tokens=min(self.max_tokens or n_ctx, n_ctx),
            chat=self.messages is not None,
        )


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
        if self.model == "":  # which is how some clients say nothing
            msgspec.structs.force_setattr(self, "model", None)
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either `messages` or `prompt`, and not both")


class NatsSubmission(
    JobSubmission, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    stream: bool = False


class Work(Struct, frozen=True):
    """What is known of a request before it runs; estimates are learned from what came of it."""

    prompt_bytes: Count
    max_tokens: Count
    chat: bool


class StateEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``infer.events.<id>.state``. ``attempt`` counts starts, not the broker's deliveries.

    ``code`` and ``message``: what went wrong in an attempt that is followed by another. A
    ``started`` that has them is stored after the attempt's first one, when its inferer has died.
    """

    state: Literal["started", "returned", "retrying"]
    attempt: Count
    at: str
    inferer: str
    work: Work | None = None
    code: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        _check_times(self.at)


class InfererDeath(Struct, frozen=True, kw_only=True):
    """``infer.events.<inferer>.died``: an inferer that ended otherwise than it should.

    ``cause`` is its signal or exit status, ``doing`` what it did for which of ``jobs``.
    """

    inferer: str
    model: str
    host: str
    at: str
    cause: str
    doing: str
    jobs: list[str] = []

    def __post_init__(self) -> None:
        _check_times(self.at)


class TokenFrame(Struct, frozen=True, kw_only=True):
    """``infer.events.<id>.tokens``: the text that each of some tokens in a row added.

    ``index`` is that of the first one. A token whose text waits for the next (half a character,
    the beginning of a stop string) adds ``""``.
    """

    attempt: Count
    index: Count
    tokens: list[str]


class Usage(Struct, frozen=True):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class Timings(Struct, frozen=True, kw_only=True):
    """Milliseconds, and tokens per second. ``first_token_ms`` counts from the attempt's start,
    ``total_ms`` from there to its end, by a clock that cannot be set."""

    queued_ms: Milliseconds
    load_ms: Milliseconds = 0.0
    prompt_ms: Milliseconds = 0.0
    first_token_ms: Milliseconds | None = None
    generation_ms: Milliseconds = 0.0
    total_ms: Milliseconds | None = None
    tokens_per_s: TokensPerS | None = None


StopCode = Literal["cancelled", "client_disconnected", "deadline_passed", "timed_out"]
"""Why a job did not come to its own end."""


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="outcome"):
    """What every result says, however the job ended."""

    id: str
    model: str
    attempt: Count
    queued_at: str
    finished_at: str
    started_at: str | None = None
    inferer: str | None = None
    timings: Timings | None = None
    owner: str | None = None
    metadata: Metadata | UnsetType = UNSET
    priority: Priority = "normal"
    retry_of: str | None = None

    def __post_init__(self) -> None:
        _check_times(self.queued_at, self.started_at, self.finished_at)


class Completed(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="completed"):
    text: str
    finish_reason: FinishReason
    usage: Usage
    chat: bool = False
    work: Work | None = None


class Failed(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="failed"):
    """``code``: ``model_error``, ``out_of_memory``, ``worker_lost``, ``prompt_too_long``,
    ``result_too_large``, ``invalid_request`` or ``internal_error``."""

    code: str
    message: str


class Cancelled(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="cancelled"):
    """``code``: ``cancelled`` (somebody asked) or ``client_disconnected``."""

    code: str
    message: str


class Expired(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="expired"):
    """``code``: ``deadline_passed`` (while it waited) or ``timed_out`` (while it ran)."""

    code: str
    message: str


Result = Completed | Failed | Cancelled | Expired


def priority_of(job_class: str) -> Priority:
    """The class named in a subject; what somebody has put there by hand counts as normal."""
    named: dict[str, Priority] = {"high": "high", "low": "low"}
    return named.get(job_class, "normal")


_STOPPED: dict[StopCode, tuple[type[Cancelled | Expired], str]] = {
    "cancelled": (Cancelled, "cancelled on request"),
    "client_disconnected": (Cancelled, "the client that waited for the answer hung up"),
    "deadline_passed": (Expired, "the deadline passed before an inferer was free"),
    "timed_out": (Expired, "the deadline passed while the job ran"),
}


def stopped(code: StopCode, **common: Any) -> Cancelled | Expired:
    """The result of a job that did not come to its own end; ``common`` as in `Outcome`."""
    kind, message = _STOPPED[code]
    return kind(**common, code=code, message=message)


class DeadLetter(Struct, frozen=True, kw_only=True):
    """``infer.dead.<model>.<id>``: a request that nobody will try again, and why.

    ``request`` is the body as it was received, or its beginning; bytes that are no UTF-8 are
    replaced. ``timeout_s`` is what it was given from its acceptance to its end, ``retry_of`` the
    job whose dead letter was sent again as this one.
    """

    id: str
    model: str
    code: str
    message: str
    attempts: Count
    at: str
    request: str
    priority: Priority = "normal"
    timeout_s: float | None = None
    retry_of: str | None = None

    def __post_init__(self) -> None:
        _check_times(self.at)


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
        _check_times(self.at)

    @classmethod
    def of(cls, letter: DeadLetter) -> Self:
        return cls(**{name: getattr(letter, name) for name in cls.__struct_fields__})


class DeadLetterPage(Struct, frozen=True, kw_only=True):
    """The newest first. ``before`` asks for the next page; None on the last."""

    letters: list[DeadLetterHead]
    before: int | None


class CancelNotice(Struct, frozen=True):
    """``infer.cancel.<id>``. Who cancels has stored the result before: this only saves work."""

    code: StopCode


class IdempotencyEntry(Struct, frozen=True):
    """An entry of the bucket ``IDEMPOTENCY``: the job that a key stands for, and the SHA-256 of
    what was submitted under it."""

    id: str
    digest: str


InfererState = Literal["idle", "busy", "stopping"]


class RunningJob(Struct, frozen=True, kw_only=True):
    """How far a job is: ``completion_tokens`` of at most ``max_tokens``."""

    id: str
    attempt: Count
    started_at: str
    completion_tokens: Count
    max_tokens: Count
    work: Work | None = None

    def __post_init__(self) -> None:
        _check_times(self.started_at)


EXTRA_BUFFERS = ("AMX_INT8", "REPACK", "KLEIDIAI")
"""Features of llama.cpp that rest while it computes without extra buffers."""


class InfererEntry(Struct, frozen=True, kw_only=True):
    """An inferer's entry in the bucket ``INFERERS``; it vanishes 10 s after the last refresh.

    ``cpus`` are the numbers of those it may run on, of which it uses ``threads``; the speeds are
    those of its last jobs, None before the first. ``idle_since`` is None while it has a job.
    ``overlaps`` are the ids of the inferers that it shares CPUs with, to the harm of both, 32 at
    most; a gateway fills it in, the bucket does not hold it. ``cpu`` is the CPU's name;
    ``cpu_features`` is what llama.cpp was compiled to use of it, in llama.cpp's words, and
    ``cpu_features_missing`` what it could use besides. ``warning`` says why it computes more slowly
    than it could, or None.
    """

    id: InfererId
    model: str
    slots: Annotated[int, Meta(ge=0, le=64)]
    host: str
    threads: Annotated[int, Meta(ge=0, le=65_536)]
    n_ctx: Count
    chat: bool
    started_at: str
    version: str
    token_bytes: Count = 0
    priority: SmallInt = 0
    state: InfererState = "idle"
    cpus: Annotated[list[SmallInt], Meta(max_length=65_536)] = []
    gpu_layers: SmallInt = 0
    jobs: Annotated[list[RunningJob], Meta(max_length=1024)] = []
    prompt_tokens_per_s: TokensPerS | None = None
    tokens_per_s: TokensPerS | None = None
    idle_since: str | None = None
    overlaps: list[str] = []
    cpu: str = ""
    cpu_features: list[str] = []
    cpu_features_missing: list[str] = []
    warning: str | None = None

    def __post_init__(self) -> None:
        _check_times(self.started_at, self.idle_since)


class ModelFacts(Struct, frozen=True):
    """What a gateway must know of a model to check requests while no inferer is alive.

    ``token_bytes`` is the length of the longest token, 0 if unknown: a prompt of more than
    ``n_ctx`` times that cannot fit.
    """

    n_ctx: Count
    chat: bool
    token_bytes: Count = 0


class AssistantMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"


class JobResult(Struct, frozen=True, kw_only=True):
    text: str
    finish_reason: FinishReason
    usage: Usage
    message: AssistantMessage | UnsetType = UNSET


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
    """How far a running job is, as of its inferer's last word, at most a second ago."""

    completion_tokens: int
    max_tokens: int


class Eta(Struct, frozen=True):
    """When a job will be done: in ``p50_s`` seconds as likely as not, in ``p90_s`` with nine
    chances in ten; ``at`` is the moment of the former."""

    p50_s: float
    p90_s: float
    at: str


class JobStatus(Struct, frozen=True, kw_only=True):
    """``position`` counts the jobs that will be served before this one, ``progress`` how far it
    is; ``eta`` is left out while nothing has been measured or nobody serves the model.
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
                message=AssistantMessage(outcome.text) if outcome.chat else UNSET,
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
    """One model's queue. ``limit`` is ``max_ack_pending`` of each of its consumers, one a class.

    With ``max_waiting`` jobs waiting the next is refused; 0 where no bound is known.
    """

    model: str
    waiting: int
    in_flight: int
    limit: int
    inferers: int
    oldest_s: float | None
    max_waiting: int = 0
    """How many may wait before more are refused; 0 where nobody said."""
    classes: dict[str, ClassQueue] = {}


class QueueReport(Struct, frozen=True):
    models: list[ModelQueue]


class FleetReport(Struct, frozen=True):
    """Every live inferer, as of its last word, at most a second ago; ``at`` is the broker's time
    of the report, which the times in it can be compared with."""

    inferers: list[InfererEntry]
    at: str | None = None


Concurrency = Annotated[int, Meta(ge=0, le=64, description="Jobs at once; 0 takes no jobs.")]


class SetConcurrency(Struct, frozen=True):
    """``infer.control.<inferer>``: how many slots to have."""

    concurrency: Concurrency


class ConcurrencyRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``PUT /concurrency`` takes: for one inferer, for those of a model, or for all."""

    concurrency: Concurrency
    model: str | None = None
    inferer: str | None = None


class ConcurrencyChange(Struct, frozen=True, kw_only=True):
    """What an inferer made of it; ``refused`` says why it did not."""

    inferer: str
    model: str
    before: int
    concurrency: int
    refused: str | None = None


class ConcurrencyReport(Struct, frozen=True):
    inferers: list[ConcurrencyChange]


class JobReference(Struct, frozen=True, forbid_unknown_fields=True):
    id: str


def _check_times(*times: str | None) -> None:
    """Raises: ValueError: one that is given is not a time."""
    for text in times:
        if text is not None:
            parse_timestamp(text)


encode = msgspec.json.Encoder().encode

decode_request = Decoder[InferenceRequest]("request", InferenceRequest)
decode_result = Decoder[Result]("result", Result)
decode_state_event = Decoder[StateEvent]("state event", StateEvent)
decode_inferer_death = Decoder[InfererDeath]("report of a death", InfererDeath)
decode_token_frame = Decoder[TokenFrame]("token frame", TokenFrame)
decode_cancel_notice = Decoder[CancelNotice]("cancel notice", CancelNotice)
decode_idempotency_entry = Decoder[IdempotencyEntry]("idempotency entry", IdempotencyEntry)
decode_dead_letter = Decoder[DeadLetter]("dead letter", DeadLetter)
decode_dead_letter_head = Decoder[DeadLetterHead]("dead letter", DeadLetterHead)
decode_concurrency = Decoder[SetConcurrency]("concurrency order", SetConcurrency)
decode_concurrency_change = Decoder[ConcurrencyChange](
    "answer to a concurrency order", ConcurrencyChange
)
decode_inferer_entry = Decoder[InfererEntry]("entry of an inferer", InfererEntry)
decode_model_facts = Decoder[ModelFacts]("description of a model", ModelFacts)
