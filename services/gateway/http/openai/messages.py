"""OpenAI's request and response bodies, and their conversion from and to Sluice's."""

import calendar
import codecs
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType, to_builtins

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import Tokens
from shared.answers.calls import Call, tool_call
from shared.answers.reader import AnswerReader, Content, Part, Reasoning
from shared.broker.consumers import ModelConsumers
from shared.errors import InvalidRequest
from shared.timestamps import parse_timestamp
from shared.wire.api import JobChoice, JobResult, JobSubmission, TimeoutS
from shared.wire.fields import Metadata
from shared.wire.logprobs import TokenLogprob, TopLogprob
from shared.wire.requests import (
    AdapterName,
    ChatMessage,
    Choices,
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
    SamplingDefaults,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TemplateOptions,
    TextPart,
    TopK,
    TopLogprobs,
)
from shared.wire.results import Completed, FinishReason, Usage
from shared.wire.tools import ToolCall, ToolCallId, ToolChoice, Tools

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on /v1/completions."""

CONTINUATION, CONTINUATION_BITS = 0b1100_0000, 0b1000_0000
"""Of the bytes of a character in UTF-8, all but the first."""

EMPTY = (b"null", b"[]", b"{}")
MAX_EMPTY_BYTES = 64
"""With white space."""


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


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
    adapter: AdapterName | None = None
    metadata: Metadata | UnsetType = UNSET
    timeout_s: TimeoutS | None = None
    priority: Priority | int | None = None
    """An extension, like ``timeout_s``. Numbers, which other servers use, are ignored."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def echoed(self) -> str:
        """What the text of each answer begins with."""
        return ""

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _options(self) -> dict[str, Any]:
        """The options that were set, with Sluice's names."""
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
    tool_calls: list[ToolCall] | None = None
    tool_call_id: ToolCallId | None = None
    reasoning_content: str | None = None

    def to_chat_message(self, number: int) -> ChatMessage:
        """``number`` is its index in the list, for the error.

        Raises:
            InvalidRequest: the content is missing.
        """
        if self.content is None and self.role != "assistant":
            param = f"messages[{number}].content"
            raise InvalidRequest(f"{param} is missing", param)
        role: Any = "system" if self.role == "developer" else self.role
        return ChatMessage(
            role,
            self.content or "",
            self.name,
            self.tool_calls or None,
            self.tool_call_id,
            self.reasoning_content,
        )


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    messages: Annotated[list[OpenAIMessage], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    """As in ``chat_template_kwargs``, like ``reasoning_effort``."""
    reasoning_effort: ReasoningEffort | None = None
    functions: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET

    def submission(self) -> JobSubmission:
        """Raises: InvalidRequest: a parameter is not supported."""
        for name in ("functions", "function_call"):
            if _is_set(getattr(self, name)):
                raise _unsupported(name, "`tools` and `tool_choice` instead")
        options = self._options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if template_options := self._template_options():
            options["chat_template_kwargs"] = template_options
        messages: Messages = [
            message.to_chat_message(number) for number, message in enumerate(self.messages)
        ]
        return JobSubmission(messages=messages, **options)

    def _template_options(self) -> TemplateOptions:
        options: TemplateOptions = {}
        if self.reasoning_effort == "none":
            options["enable_thinking"] = False
        elif self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        return options | (self.chat_template_kwargs or {})


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    prompt: Prompt | list[Prompt]
    logprobs: TopLogprobs | None = None
    """How many of the likeliest tokens to list; with 0 only those of the answer."""
    best_of: int | None = None
    echo: bool | None = None
    """Whether the text of each answer begins with the prompt."""
    suffix: str | None = None

    def submission(self) -> JobSubmission:
        """Raises: InvalidRequest: not exactly one prompt, or a parameter is not supported."""
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest(
                "best_of: not supported, because answers are not ranked; use n instead",
                "best_of",
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo: cannot be combined with logprobs, which cover only the answer; leave "
                "one of them out",
                "echo",
            )
        if self.suffix:
            raise _unsupported("suffix", "continuation only")
        prompt = self._prompt
        most = max(DEFAULT_COMPLETION_TOKENS, self.min_tokens or 0)
        options = {"max_tokens": most, **self._options()}
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return JobSubmission(prompt=prompt, **options)

    @property
    def echoed(self) -> str:
        """What the text of each answer begins with."""
        return self._prompt if self.echo else ""

    @property
    def _prompt(self) -> str:
        """Raises: InvalidRequest: not exactly one."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(prompts) != 1:
            raise InvalidRequest("prompt: give one prompt per request", "prompt")
        return prompts[0]


class Choice(Struct, frozen=True, kw_only=True):
    index: int = 0
    message: dict[str, Any] | UnsetType = UNSET
    delta: dict[str, Any] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class Answer(Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of a streamed one, of a chat or a prompt."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    """``adapters`` are the LoRA adapters that a request may name, ``sampling_defaults`` what holds
    where it does not say; null until an inferer has served the model once."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "sluice"
    adapters: list[str] | None = None
    sampling_defaults: SamplingDefaults | None = None

    @classmethod
    def of(cls, model: ModelConsumers) -> "ModelCard":
        created = calendar.timegm(model.created.utctimetuple()) if model.created else 0
        facts = model.facts
        if facts is None:
            return cls(id=model.name, created=created)
        return cls(
            id=model.name,
            created=created,
            adapters=facts.adapters,
            sampling_defaults=facts.sampling_defaults,
        )


class ModelList(Struct, frozen=True, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


def completion(accepted: AcceptedJob, result: Completed, echoed: str) -> Answer:
    """The response to a request that did not stream."""
    choices = []
    for index, one in enumerate(JobChoice.all_of(result)):
        logprobs = None
        if one.logprobs is not UNSET:
            logprobs = logprobs_of(accepted, one.logprobs, TextOffsets())
        reason = one.finish_reason
        if one.message is not UNSET:
            message = {"refusal": None, **to_builtins(one.message)}
            choice = Choice(index=index, message=message, logprobs=logprobs, finish_reason=reason)
        else:
            text = echoed + one.text
            choice = Choice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        choices.append(choice)
    kind = "chat.completion" if accepted.task == "chat" else "text_completion"
    return _answer(accepted, kind, choices, result.usage)


class Chunks:
    """The chunks of a streamed response with ``n`` answers. With ``include_usage``, ``usage`` is
    null in all but the last."""

    def __init__(self, accepted: AcceptedJob, n: int, include_usage: bool, echoed: str) -> None:
        self._accepted = accepted
        self._n = n
        self._include_usage = include_usage
        self._echoed = echoed
        self._choices: dict[int, _ChoiceChunks] = {}

    def opening(self) -> list[Answer]:
        """The first ones."""
        return [self._choice(index).opening() for index in range(self._n)]

    def text(self, tokens: Tokens) -> list[Answer]:
        """Those for what the model wrote next."""
        return self._choice(tokens.choice).text(tokens.text, tokens.logprobs)

    def end(self, result: JobResult) -> list[Answer]:
        """The last ones."""
        reasons = [result.finish_reason or None]
        if result.choices is not UNSET:
            reasons = [one.finish_reason for one in result.choices]
        chunks: list[Answer] = []
        for index, reason in enumerate(reasons):
            chunks += self._choice(index).end(reason)
        if self._include_usage:
            chunks.append(_answer(self._accepted, _chunk_kind(self._accepted), [], result.usage))
        return chunks

    def _choice(self, index: int) -> "_ChoiceChunks":
        if index not in self._choices:
            self._choices[index] = _ChoiceChunks(
                self._accepted, index, self._include_usage, self._echoed
            )
        return self._choices[index]


class _ChoiceChunks:
    """Those of one answer."""

    def __init__(self, accepted: AcceptedJob, index: int, include_usage: bool, echoed: str) -> None:
        self._accepted = accepted
        self._index = index
        self._include_usage = include_usage
        self._echoed = echoed
        self._offsets = TextOffsets()
        self._reader = AnswerReader(accepted.format)
        self._calls = 0

    def opening(self) -> Answer:
        """The first one."""
        if self._accepted.task != "chat":
            return self._chunk(text=self._echoed)
        return self._chunk(delta={"role": "assistant", "content": ""})

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Answer]:
        """Those for what the model wrote next."""
        known = logprobs_of(self._accepted, logprobs, self._offsets) if logprobs else None
        if self._accepted.task != "chat":
            return [self._chunk(text=text, logprobs=known)]
        deltas = self._deltas(self._reader.add(text)) or ([{}] if known else [])
        return [
            self._chunk(delta=delta, logprobs=None if number else known)
            for number, delta in enumerate(deltas)
        ]

    def end(self, reason: str | None) -> list[Answer]:
        """The last ones, with the reason why it ended."""
        if self._accepted.task == "chat":
            left = self._deltas(self._reader.finish())
            chunks = [self._chunk(delta=delta) for delta in left]
            chunks.append(self._chunk(delta={}, finish_reason=reason))
        else:
            chunks = [self._chunk(text="", finish_reason=reason)]
        return chunks

    def _deltas(self, parts: list[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case Reasoning(text):
                    deltas.append({"reasoning_content": text})
                case Content(text):
                    deltas.append({"content": text})
                case Call():
                    call = tool_call(part, self._accepted.id, self._calls, self._index)
                    delta = {"index": self._calls, **to_builtins(call)}
                    deltas.append({"tool_calls": [delta]})
                    self._calls += 1
        return deltas

    def _chunk(self, *, finish_reason: Any = None, **content: Any) -> Answer:
        choice = Choice(index=self._index, finish_reason=finish_reason, **content)
        usage = None if self._include_usage else UNSET
        return _answer(self._accepted, _chunk_kind(self._accepted), [choice], usage)


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
