"""OpenAI's request bodies, and their conversion to Sluice's."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from shared.errors import InvalidRequest
from shared.wire.api import JobSubmission, TimeoutS
from shared.wire.fields import Metadata
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
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TemplateOptions,
    TextPart,
    TopK,
    TopLogprobs,
)
from shared.wire.tools import ToolCall, ToolCallId, ToolChoice, Tools

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on /v1/completions."""

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


def _is_set(value: Raw | UnsetType) -> bool:
    """Whether an unsupported parameter, which is never decoded, has a value."""
    if value is UNSET:
        return False
    return len(value) > MAX_EMPTY_BYTES or b"".join(bytes(value).split()) not in EMPTY


def _unsupported(param: str, instead: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported: Sluice offers {instead}", param)
