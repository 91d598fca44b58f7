"""How a job ended: the message on ``RESULTS``, and on ``DEAD``."""

import math
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.wire.answers import AnswerFormat
from shared.wire.fields import Count, Metadata, Milliseconds, TokensPerS, check_times
from shared.wire.inputs import Document
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import MAX_CHOICES, Priority, Task, Via, Work
from shared.wire.responses import ResponseForm
from shared.wire.subjects import PUBLIC

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Struct, frozen=True):
    """``cached_tokens``: those that an earlier job had computed."""

    cached_tokens: Count = 0


class Usage(Struct, frozen=True):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that this job had to compute."""
        return max(0, self.prompt_tokens - self.prompt_tokens_details.cached_tokens)


class Timings(Struct, frozen=True, kw_only=True):
    """Milliseconds, and tokens per second. ``first_token_ms`` counts from the attempt's start,
    ``total_ms`` from there to its end, by a clock that cannot be set. ``prompt_delay_ms`` and
    ``generation_delay_ms`` are how much of ``prompt_ms`` and ``generation_ms`` is due to jobs that
    ran beside it, as estimated."""

    queued_ms: Milliseconds
    load_ms: Milliseconds = 0.0
    prompt_ms: Milliseconds = 0.0
    first_token_ms: Milliseconds | None = None
    generation_ms: Milliseconds = 0.0
    total_ms: Milliseconds | None = None
    prompt_delay_ms: Milliseconds = 0.0
    generation_delay_ms: Milliseconds = 0.0
    tokens_per_s: TokensPerS | None = None


StopCode = Literal["cancelled", "client_disconnected", "deadline_passed", "timed_out"]
"""Why a job was ended from outside."""


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
    owner: str = PUBLIC
    metadata: Metadata | UnsetType = UNSET
    priority: Priority = "normal"
    retry_of: str | None = None
    via: Via | None = None
    preview: str = ""
    """Copied from the request, like ``response``."""
    response: ResponseForm | None = None

    def __post_init__(self) -> None:
        check_times(self.queued_at, self.started_at, self.finished_at)


FLOAT_BYTES = 4


class RankedDocument(Struct, frozen=True, omit_defaults=True):
    """A document by its index in the request, and what the model makes of it for the query."""

    index: Count
    relevance_score: float
    document: Document | UnsetType = UNSET


class Choice(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer to a request. ``logprobs`` are those of its tokens, if the request asks for
    them."""

    text: str
    finish_reason: FinishReason
    completion_tokens: Count
    logprobs: list[TokenLogprob] | None = None


class Completed(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="completed"):
    """``text``, ``finish_reason`` and ``logprobs`` are those of the first answer; ``usage`` counts
    all answers, and the prompt once."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    task: Task = "complete"
    work: Work | None = None
    logprobs: list[TokenLogprob] | None = None
    """The log probabilities of the answer's tokens, if the request asks for them."""
    other_choices: Annotated[list[Choice], Meta(max_length=MAX_CHOICES - 1)] = []
    """The answers after the first, if the request asks for several."""
    format: AnswerFormat | None = None
    """How reasoning and tool calls are marked in the text; None if there are none."""
    embeddings: list[bytes] | None = None
    """One for each input, as little-endian 32-bit floats; in JSON as base64."""
    ranking: list[RankedDocument] | None = None
    """The best first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(embedding) % FLOAT_BYTES for embedding in self.embeddings or ()):
            raise ValueError("an embedding is not made of 32-bit floats")
        if not all(math.isfinite(one.relevance_score) for one in self.ranking or ()):
            raise ValueError("a relevance score is not a number")

    @property
    def choices(self) -> list[Choice]:
        """All answers."""
        others = sum(choice.completion_tokens for choice in self.other_choices)
        first = Choice(
            text=self.text,
            finish_reason=self.finish_reason,
            completion_tokens=max(0, self.usage.completion_tokens - others),
            logprobs=self.logprobs,
        )
        return [first, *self.other_choices]


class Failed(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="failed"):
    """``code``: ``model_error``, ``out_of_memory``, ``worker_lost``, ``prompt_too_long``,
    ``result_too_large``, ``invalid_request`` or ``internal_error``. ``param`` names the invalid
    field of the request, if there is one."""

    code: str
    message: str
    param: str | None = None


class Cancelled(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="cancelled"):
    """``code``: ``cancelled`` (somebody asked) or ``client_disconnected``."""

    code: str
    message: str


class Expired(Outcome, frozen=True, kw_only=True, omit_defaults=True, tag="expired"):
    """``code``: ``deadline_passed`` (while it waited) or ``timed_out`` (while it ran)."""

    code: str
    message: str


Result = Completed | Failed | Cancelled | Expired


_STOPPED: dict[StopCode, tuple[type[Cancelled | Expired], str]] = {
    "cancelled": (Cancelled, "cancelled on request"),
    "client_disconnected": (Cancelled, "the client that waited for the answer hung up"),
    "deadline_passed": (Expired, "the deadline passed before an inferer was free"),
    "timed_out": (Expired, "the deadline passed while the job ran"),
}


def stopped(code: StopCode, **common: Any) -> Cancelled | Expired:
    """The result of a job that was ended from outside; ``common`` as in `Outcome`."""
    kind, message = _STOPPED[code]
    return kind(**common, code=code, message=message)


class DeadLetter(Struct, frozen=True, kw_only=True):
    """``infer.dead.<model>.<id>``: a request that will not be retried, and why.

    ``request`` is the body as it was received, or its beginning; bytes that are not UTF-8 are
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
        check_times(self.at)
