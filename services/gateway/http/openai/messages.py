"""OpenAI's request and response bodies, and their conversion from and to Sluice's."""

import calendar
import codecs
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.gateway.jobs.accepted import AcceptedJob
from shared.broker.consumers import ModelConsumers
from shared.errors import InvalidRequest
from shared.timestamps import parse_timestamp
from shared.wire.api import JobSubmission, TimeoutS
from shared.wire.fields import Metadata
from shared.wire.logprobs import TokenLogprob, TopLogprob
from shared.wire.requests import (
    ChatMessage,
    LogitBias,
    MaxTokens,
    Messages,
    MinTokens,
    Penalty,
    Priority,
    Probability,
    Prompt,
    RepeatPenalty,
    ResponseFormat,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TextPart,
    TopK,
    TopLogprobs,
)
from shared.wire.results import Completed, FinishReason, Usage

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on /v1/completions."""

CONTINUATION, CONTINUATION_BITS = 0b1100_0000, 0b1000_0000
"""Of the bytes of a character in UTF-8, all but the first."""

EMPTY = (b"null", b"[]", b"{}")
MAX_EMPTY_BYTES = 64
"""With white space."""


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """The fields of both routes. Unsupported parameters that would change the answer are refused by
    name; others are ignored."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    response_format: ResponseFormat | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    cache_prompt: bool | None = None
    metadata: Metadata | UnsetType = UNSET
    timeout_s: TimeoutS | None = None
    priority: Priority | int | None = None
    """An extension, like ``timeout_s``. Numbers, which other servers use, are ignored."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _options(self) -> dict[str, Any]:
        """The options that were set, with Sluice's names.

        Raises:
            InvalidRequest: one of them is not supported.
        """
        if self.n not in (None, 1):
            raise _unsupported("n", "one answer per request")
        named = {name: getattr(self, name, None) for name in JobSubmission.__struct_fields__}
        return {
            name: value
            for name, value in named.items()
            if value is not None
            and name not in ("messages", "prompt")
            and not (name == "priority" and isinstance(value, int))
        }


class OpenAIMessage(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    """Absent or null if an assistant only called tools."""
    name: str | None = None

    def to_chat_message(self, number: int) -> ChatMessage:
        """``number`` is its index in the list, for the error.

        Raises:
            InvalidRequest: the content is missing.
        """
        if self.content is None and self.role != "assistant":
            param = f"messages[{number}].content"
            raise InvalidRequest(f"{param} is missing", param)
        role: Any = "system" if self.role == "developer" else self.role
        return ChatMessage(role, self.content or "", self.name)


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: Annotated[list[OpenAIMessage], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Raw | UnsetType = UNSET
    functions: Raw | UnsetType = UNSET

    def submission(self) -> JobSubmission:
        """Raises: InvalidRequest: a parameter is not supported."""
        if _is_set(self.tools) or _is_set(self.functions):
            raise _unsupported("tools", "no tools; use response_format for structured output")
        options = self._options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        messages: Messages = [
            message.to_chat_message(number) for number, message in enumerate(self.messages)
        ]
        return JobSubmission(messages=messages, **options)


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: Prompt | list[Prompt]
    logprobs: TopLogprobs | None = None
    """How many of the likeliest tokens to list; with 0 only those of the answer."""
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def submission(self) -> JobSubmission:
        """Raises: InvalidRequest: not exactly one prompt, or a parameter is not supported."""
        if self.best_of not in (None, 1):
            raise _unsupported("best_of", "one answer per request")
        if self.echo:
            raise _unsupported("echo", "the answer without its prompt")
        if self.suffix:
            raise _unsupported("suffix", "continuation only")
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise InvalidRequest("prompt: give one prompt per request", "prompt")
        most = max(DEFAULT_COMPLETION_TOKENS, self.min_tokens or 0)
        options = {"max_tokens": most, **self._options()}
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return JobSubmission(prompt=prompts[0], **options)


class Choice(Struct, frozen=True, kw_only=True):
    index: int = 0
    message: dict[str, Any] | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | None


class Answer(Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of a streamed one, of a chat or a prompt."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "sluice"

    @classmethod
    def of(cls, model: ModelConsumers) -> "ModelCard":
        created = calendar.timegm(model.created.utctimetuple()) if model.created else 0
        return cls(id=model.name, created=created)


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


def completion(accepted: AcceptedJob, result: Completed) -> Answer:
    """The response to a request that did not stream."""
    logprobs = None
    if result.logprobs is not None:
        logprobs = logprobs_of(accepted, result.logprobs, TextOffsets())
    reason = result.finish_reason
    if accepted.task == "chat":
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice = Choice(message=message, logprobs=logprobs, finish_reason=reason)
    else:
        choice = Choice(text=result.text, logprobs=logprobs, finish_reason=reason)
    kind = "chat.completion" if accepted.task == "chat" else "text_completion"
    return _answer(accepted, kind, [choice], result.usage)


def chunk(
    accepted: AcceptedJob,
    text: str,
    include_usage: bool,
    *,
    opening: bool = False,
    finish_reason: FinishReason | None = None,
    logprobs: dict[str, Any] | None = None,
) -> Answer:
    """One chunk of a streamed answer. With ``include_usage``, ``usage`` is null in all but the
    last."""
    if accepted.task == "chat":
        delta = {"content": text} if text or opening else {}
        choice = Choice(
            delta={"role": "assistant", **delta} if opening else delta,
            logprobs=logprobs,
            finish_reason=finish_reason,
        )
    else:
        choice = Choice(text=text, logprobs=logprobs, finish_reason=finish_reason)
    return _answer(accepted, _chunk_kind(accepted), [choice], None if include_usage else UNSET)


def usage_chunk(accepted: AcceptedJob, usage: Usage) -> Answer:
    return _answer(accepted, _chunk_kind(accepted), [], usage)


class TextOffsets:
    """Counts the characters of an answer, token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, piece: bytes) -> int:
        """Where the next token begins, which adds ``piece``."""
        if piece and piece[0] & CONTINUATION != CONTINUATION_BITS:
            # What came before was no character.
            self._characters += len(self._decoder.decode(b"", final=True))
        begin = self._characters
        self._characters += len(self._decoder.decode(piece))
        return begin


def logprobs_of(
    accepted: AcceptedJob, logprobs: Sequence[TokenLogprob], offsets: TextOffsets
) -> dict[str, Any]:
    """In the form of the route by which the job came."""
    if accepted.task == "chat":
        content = [
            {**_openai_logprob(one), "top_logprobs": [_openai_logprob(other) for other in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}
    tokens = [one.token for one in logprobs]
    tops = [{other.token: other.logprob for other in one.top} for one in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [offsets.next(one.piece) for one in logprobs],
    }


def _openai_logprob(one: TopLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.piece)}


def _chunk_kind(accepted: AcceptedJob) -> str:
    return "chat.completion.chunk" if accepted.task == "chat" else "text_completion"


def _answer(
    accepted: AcceptedJob, kind: str, choices: list[Choice], usage: Usage | UnsetType | None
) -> Answer:
    prefix = "chatcmpl" if accepted.task == "chat" else "cmpl"
    return Answer(
        id=f"{prefix}-{accepted.id}",
        object=kind,
        created=int(parse_timestamp(accepted.queued_at).timestamp()),
        model=accepted.model,
        choices=choices,
        usage=usage,
    )


def _is_set(value: Raw | UnsetType) -> bool:
    """Whether an unsupported parameter, which is never decoded, has a value."""
    if value is UNSET:
        return False
    return len(value) > MAX_EMPTY_BYTES or b"".join(bytes(value).split()) not in EMPTY


def _unsupported(param: str, instead: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported: Sluice offers {instead}", param)
