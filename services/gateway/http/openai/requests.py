"""OpenAI's request bodies, and their conversion to Sluice's."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.gateway.http.openai.generation import NO_LIMIT, GenerationRequest, template_options
from services.gateway.http.openai.parameters import (
    CHAT,
    COMPLETIONS,
    OtherParameters,
    Refused,
)
from shared.errors import InvalidRequest
from shared.wire.api import Submission
from shared.wire.inputs import AnyInput, Inputs, inputs_of
from shared.wire.requests import (
    ChatMessage,
    Choices,
    MaxTokens,
    Messages,
    ResponseFormat,
    TemplateOptions,
    TextPart,
    TopLogprobs,
)
from shared.wire.responses import ReasoningEffort
from shared.wire.strict import StrictFormat, StrictToolChoice, StrictTools
from shared.wire.tools import ToolCall, ToolCallId

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` on /v1/completions."""

MAX_PROMPTS = 64
"""The most prompts in one request; each becomes a job."""


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: it would pad the chunks, so that their size does not reveal the text."""
    continuous_usage_stats: Literal[False] | None = None


class TextRequest(GenerationRequest, frozen=True, kw_only=True):
    """The parameters of the routes for chats and completions."""

    max_tokens: MaxTokens | None = None
    """The maximum length of an answer, in tokens. It may exceed the context: the answer then ends
    when the context is full."""
    response_format: StrictFormat | None = None
    stream: bool | None = None
    """Whether the answer is sent as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """`include_usage`: the stream ends with a chunk that contains `usage`. Without `stream` it has
    no effect, because the response always contains `usage`."""
    n: Choices | None = None

    @property
    def own_format(self) -> dict[str, ResponseFormat | None]:
        return {"response_format": self.response_format}

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ContentText(Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: Raw | UnsetType = UNSET
    """Ignored, like `prompt_cache_breakpoint`: the prompt cache works automatically."""
    prompt_cache_breakpoint: Raw | UnsetType = UNSET


class ContentRefusal(
    Struct, frozen=True, tag_field="type", tag="refusal", forbid_unknown_fields=True
):
    refusal: str


IN_MESSAGES: dict[str, Refused] = {
    "audio": Refused("only text is supported; leave it out"),
    "function_call": Refused("send the call in `tool_calls`"),
}


class OpenAIMessage(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentText | ContentRefusal] | None = None
    """May be absent or null if an assistant only called tools or refused."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: ToolCallId | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of it, in vLLM and Ollama."""
    refusal: str | None = None
    """The text with which an assistant refused to answer."""
    audio: Raw | UnsetType = UNSET
    function_call: Raw | UnsetType = UNSET
    annotations: Raw | UnsetType = UNSET
    """Not used, like the following; clients send back what they got."""
    parsed: Raw | UnsetType = UNSET
    provider_specific_fields: Raw | UnsetType = UNSET
    cache_control: Raw | UnsetType = UNSET

    def to_chat_message(self, number: int) -> ChatMessage:
        """``number`` is the index of this message in the list, for errors.

        Raises:
            InvalidRequest: the content is missing, or something in it is not supported.
        """
        param = f"messages[{number}]"
        if self.role == "function":
            raise InvalidRequest(
                f"{param}.role: function is not supported; send the result of a call as role tool, "
                "with its tool_call_id",
                f"{param}.role",
            )
        for name, refused in IN_MESSAGES.items():
            if value := getattr(self, name):
                refused.require_nothing(f"{param}.{name}", value)
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"{param}.content is missing", f"{param}.content")
        if self.refusal and self.role != "assistant":
            raise InvalidRequest(
                f"{param}.refusal: only messages with the role assistant can have one",
                f"{param}.refusal",
            )
        role: Any = "system" if self.role == "developer" else self.role
        return ChatMessage(
            role,
            self._content,
            self.name,
            self.tool_calls or None,
            self.tool_call_id,
            self.reasoning_content or self.reasoning,
        )

    @property
    def _content(self) -> str | list[TextPart]:
        """The content, in which a refusal is an ordinary text."""
        content = self.content or ""
        if isinstance(content, str) and not self.refusal:
            return content
        parts = [ContentText(content)] if isinstance(content, str) else content
        texts = [part.text if isinstance(part, ContentText) else part.refusal for part in parts]
        return [TextPart("text", text) for text in (*texts, self.refusal or "") if text]


class ChatRequest(TextRequest, frozen=True, kw_only=True):
    others: ClassVar[OtherParameters] = CHAT

    messages: Annotated[list[OpenAIMessage], Meta(min_length=1)]
    """The conversation. The parts of a `content` can have the types `text` and `refusal`."""
    max_completion_tokens: MaxTokens | None = None
    """Another name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: StrictTools | None = None
    tool_choice: StrictToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    """As in `chat_template_kwargs`."""
    reasoning_effort: ReasoningEffort | None = None
    """As in `chat_template_kwargs`; `none` is the same as `enable_thinking: false`."""

    @property
    def echoed(self) -> list[str]:
        """What the text of each answer begins with."""
        return [""]

    def submissions(self) -> list[Submission]:
        """A single job. Raises: InvalidRequest: two parameters contradict each other."""
        options = self._options(
            "n", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"
        )
        if of_template := template_options(
            self.reasoning_effort, self.enable_thinking, self.chat_template_kwargs
        ):
            options["chat_template_kwargs"] = of_template
        messages: Messages = [
            message.to_chat_message(number) for number, message in enumerate(self.messages)
        ]
        return [Submission(messages=messages, **options)]


class CompletionRequest(TextRequest, frozen=True, kw_only=True):
    others: ClassVar[OtherParameters] = COMPLETIONS

    prompt: AnyInput
    """A text to continue, or its tokens, which are used unchanged; or a list of up to 64 of these.
    Each prompt becomes a separate job; choice `i` of prompt `p` has the index `p * n + i`."""
    logprobs: TopLogprobs | None = None
    """How many of the likeliest tokens to return; with 0 only those of the answer."""
    best_of: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """The same as `n`: answers are not ranked, so a larger number is refused."""
    echo: bool | None = None
    """Whether the text of each answer begins with the prompt. Cannot be combined with `logprobs` or
    with prompts that are tokens."""

    def __post_init__(self) -> None:
        prompts = inputs_of(self.prompt, "prompt")  # an invalid prompt is an error in the body
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(
                f"`prompt` has {len(prompts)} items, more than {MAX_PROMPTS}; send fewer"
            )

    def submissions(self) -> list[Submission]:
        """A job for each prompt. Raises: InvalidRequest: a parameter is not supported, or two
        contradict each other."""
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
        if self.echo and not all(isinstance(prompt, str) for prompt in self._prompts):
            raise InvalidRequest(
                "echo: needs prompts that are texts, not tokens; leave it out", "echo"
            )
        most = max(DEFAULT_COMPLETION_TOKENS, self.min_tokens or 0)
        options = self._options("n")
        if self.n_predict != NO_LIMIT:
            options.setdefault("max_tokens", most)
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return [
            Submission(prompt=prompt, **options)
            if isinstance(prompt, str)
            else Submission(prompt_tokens=prompt, **options)
            for prompt in self._prompts
        ]

    @property
    def echoed(self) -> list[str]:
        """What the text of each answer begins with, for each prompt."""
        return [prompt if self.echo and isinstance(prompt, str) else "" for prompt in self._prompts]

    @property
    def _prompts(self) -> Inputs:
        return inputs_of(self.prompt, "prompt")
