"""OpenAI's request bodies, and their conversion to Sluice's."""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.gateway.http.openai.parameters import (
    CHAT,
    COMPLETIONS,
    Body,
    OtherParameters,
    Refused,
)
from services.gateway.http.openai.structured import StructuredOutputs, formats_of
from shared.errors import InvalidRequest
from shared.wire.api import Submission, TimeoutS
from shared.wire.fields import Metadata
from shared.wire.inputs import AnyInput, Inputs, inputs_of
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
    RepeatPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
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

RANDOM_SEED = -1
"""In llama.cpp and vLLM, this ``seed`` means the same as none."""

NO_LIMIT = -1
"""In llama.cpp, the ``n_predict`` that means no limit."""

AnyPriority = Priority | Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: it would pad the chunks, so that their size does not reveal the text."""
    continuous_usage_stats: Literal[False] | None = None


class TextRequest(Body, frozen=True, kw_only=True):
    """The parameters of both routes that generate text."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 or -1 disables it."""
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    """Another name of `repeat_penalty`."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: MaxTokens | None = None
    """The maximum length of an answer, in tokens. It may exceed the context: the answer then ends
    when the context is full."""
    n_predict: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Another name of `max_tokens`; -1 means no limit."""
    seed: Seed | None = None
    """With the same seed, a request usually gets the same answer; -1 means a random one."""
    stop: Stop | None = None
    """A text that ends the answer and is not part of it, or up to 16 of them."""
    response_format: StrictFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's constraint on the answer: one of `json`, `json_object`, `regex`, `choice` and
    `grammar`."""
    guided_json: Raw | UnsetType = UNSET
    """A JSON schema that the answer must match, as an object or as text."""
    guided_regex: str | None = None
    """A regular expression that the whole answer must match."""
    guided_choice: list[str] | None = None
    """The answer must be one of these texts."""
    guided_grammar: str | None = None
    """A grammar that the answer must match, in GBNF."""
    grammar: str | None = None
    """llama.cpp's name of `guided_grammar`."""
    json_schema: Raw | UnsetType = UNSET
    """llama.cpp's name of `guided_json`."""
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    cache_prompt: bool | None = None
    adapter: AdapterName | None = None
    metadata: Metadata | UnsetType = UNSET
    timeout_s: TimeoutS | None = None
    priority: AnyPriority | None = None
    """`high`, `normal` or `low`, or a number as in vLLM: below 0 is high, 0 normal, above 0 low."""
    stream: bool | None = None
    """Whether the answer is sent as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """`include_usage`: the stream ends with a chunk that contains `usage`. Without `stream` it has
    no effect, because the response always contains `usage`."""
    n: Choices | None = None

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _options(self) -> dict[str, Any]:
        """The options that were set, with Sluice's names.

        Raises:
            InvalidRequest: two parameters contradict each other.
        """
        named = {name: getattr(self, name, None) for name in Submission.__struct_fields__}
        named |= {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "repeat_penalty": self._same("repeat_penalty", "repetition_penalty"),
            "max_tokens": self._same("max_tokens", "max_completion_tokens", "n_predict"),
            "seed": None if self.seed == RANDOM_SEED else self.seed,
            "priority": None if self.priority is None else priority_of(self.priority),
            "response_format": next(iter(formats_of(self).values()), None),
        }
        if self.n_predict == 0:
            raise InvalidRequest("n_predict must be at least 1, or -1 for no limit", "n_predict")
        if named["max_tokens"] == NO_LIMIT:
            del named["max_tokens"]
        named = {name: value for name, value in named.items() if value is not None}
        return {name: named[name] for name in named if name not in ("messages", "prompt")}

    def as_sent(self, error: InvalidRequest) -> InvalidRequest:
        names = {
            "response_format": [*formats_of(self)],
            "repeat_penalty": ["repetition_penalty"],
            "max_tokens": ["max_completion_tokens", "n_predict"],
            "chat_template_kwargs": ["chat_template_kwargs", "reasoning_effort", "enable_thinking"],
            "prompt_tokens": ["prompt"],
        }.get(error.param or "", [])
        for name in names:
            if "." in name or getattr(self, name, None) is not None:
                assert error.param is not None
                return type(error)(error.message.replace(error.param, name, 1), name)
        return error

    def _same(self, *names: str) -> Any:
        """The value of a parameter that has several ``names``.

        Raises: InvalidRequest: they have different values.
        """
        given = {name: getattr(self, name, None) for name in names}
        values = [(name, value) for name, value in given.items() if value is not None]
        for name, value in values:
            if value != values[0][1]:
                raise InvalidRequest(
                    f"{name}: differs from {values[0][0]}, which means the same; send one of them",
                    name,
                )
        return values[0][1] if values else None


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
        options = self._options()
        if template_options := self._template_options():
            options["chat_template_kwargs"] = template_options
        messages: Messages = [
            message.to_chat_message(number) for number, message in enumerate(self.messages)
        ]
        return [Submission(messages=messages, **options)]

    def _template_options(self) -> TemplateOptions:
        options = effort_options(self.reasoning_effort)
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        return options | (self.chat_template_kwargs or {})


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
        options = self._options()
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


def effort_options(effort: ReasoningEffort | None) -> TemplateOptions:
    """The options of a chat template that stand for an effort of reasoning."""
    if effort is None:
        return {}
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


def priority_of(given: AnyPriority) -> Priority:
    """A client's priority as Sluice's. In vLLM it is a number, and the lowest runs first."""
    if isinstance(given, str):
        return given
    return "high" if given < 0 else "low" if given > 0 else "normal"
