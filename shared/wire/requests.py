"""What a job is asked to do: the message on ``REQUESTS``."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.structs import force_setattr

from shared.wire.fields import AtLeastOne, Count, JobId, Metadata, check_times
from shared.wire.inputs import Inputs, Text, Texts, TokenId, TokenIds, TopN, input_bytes, utf8_bytes
from shared.wire.responses import ResponseForm
from shared.wire.tools import Tool, ToolCall, ToolCallId, ToolChoice, Tools

Role = Literal["system", "user", "assistant", "tool"]
MaxTokens = Annotated[int, Meta(ge=1, le=2**31 - 1, description="Tokens to generate, at most.")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="0 always takes the likeliest token.")]
Probability = Annotated[float, Meta(ge=0, le=1)]
AdapterName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)",
        description="A LoRA adapter of the model, as `/v1/models` lists them.",
    ),
]
TopK = Annotated[int, Meta(ge=0, le=2**31 - 1, description="0 disables it.")]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=10, description="1 disables it.")]
StopString = Annotated[str, Meta(min_length=1)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=16)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024, description="Added to the logits of tokens; -100 bans a token."),
]
MinTokens = Annotated[
    int, Meta(ge=0, le=2**31 - 1, description="Before so many, only `stop` can end the answer.")
]
TopLogprobs = Annotated[
    int, Meta(ge=0, le=20, description="Likeliest tokens in place of each; needs `logprobs`.")
]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=16)]
MAX_CHOICES = 8
Choices = Annotated[
    int,
    Meta(
        ge=1,
        le=MAX_CHOICES,
        description="Answers to the one prompt; the first has the `seed`, the next `seed` + 1, …",
    ),
]
Prompt = Annotated[str, Meta(min_length=1)]
Priority = Literal["high", "normal", "low"]
"""Strictly in this order, first in first out within each."""
Task = Literal["chat", "complete", "embed", "rerank"]
"""What is asked of the model. The first two generate text."""
TEXT_TASKS: tuple[Task, ...] = ("chat", "complete")
Via = Literal["http", "openai", "nats", "retry", "cli"]
"""How a job came to its gateway."""


class TextPart(Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """``tool_calls`` and ``reasoning_content`` are those of an assistant, which may have called
    tools without a word; ``tool_call_id`` says which call a tool's message is the result of."""

    role: Role
    content: str | Sequence[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: ToolCallId | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None:
            if not self.tool_calls:
                # As msgspec says it of other fields.
                raise ValueError("Object missing required field `content`")
            force_setattr(self, "content", "")

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def texts(self) -> list[str]:
        """Everything in it that reaches the prompt."""
        calls = [call.function for call in self.tool_calls or []]
        found = [self.text, self.reasoning_content or ""]
        return found + [text for call in calls for text in (call.name, call.arguments)]


Messages = Annotated[Sequence[ChatMessage], Meta(min_length=1)]
TemplateOptionName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$(?!\n)")]
TemplateOptions = Annotated[
    dict[TemplateOptionName, bool | int | float | str | None],
    Meta(
        max_length=32,
        description="Options of the model's chat template, such as `enable_thinking`.",
    ),
]


class PlainText(Struct, frozen=True, tag_field="type", tag="text"):
    """``response_format`` that asks for nothing special."""


SchemaSource = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]


class NamedSchema(Struct, frozen=True, omit_defaults=True):
    source: SchemaSource = msgspec.field(name="schema")
    """The schema as it was sent. Decoded, it could take hundreds of megabytes."""
    name: str = "response"
    description: str | None = None
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """Raises: ValueError, RecursionError: it cannot be read, or is not an object."""
        return msgspec.json.decode(self.source, type=dict[str, Any])


class JsonSchema(Struct, frozen=True, tag_field="type", tag="json_schema"):
    """``response_format`` that asks for JSON valid under a schema."""

    json_schema: NamedSchema


class JsonObject(Struct, frozen=True, tag_field="type", tag="json_object", omit_defaults=True):
    """``response_format`` that asks for any JSON object; or, as llama.cpp's server takes it, for
    JSON valid under a schema: then it is replaced by a `JsonSchema`."""

    source: SchemaSource | UnsetType = msgspec.field(name="schema", default=UNSET)


MAX_GRAMMAR_CHARS = 32 * 1024
GrammarText = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class GrammarFormat(Struct, frozen=True, tag_field="type", tag="grammar"):
    """A ``response_format`` for a text that matches a grammar in GBNF, llama.cpp's notation."""

    grammar: GrammarText


class RegexFormat(Struct, frozen=True, tag_field="type", tag="regex"):
    """A ``response_format`` for a text that matches a regular expression as a whole."""

    pattern: GrammarText


ResponseFormat = PlainText | JsonObject | JsonSchema | GrammarFormat | RegexFormat


class SamplingDefaults(Struct, frozen=True, kw_only=True):
    """What holds where a request does not say: the values in the model's GGUF, or else llama.cpp's
    own, which are those below."""

    temperature: Temperature = 0.8
    top_p: Probability = 0.95
    top_k: TopK = 40
    min_p: Probability = 0.05
    repeat_penalty: RepeatPenalty = 1.0


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when to stop."""

    max_tokens: MaxTokens | None = None
    """The most tokens of an answer; by default until the context is full."""
    temperature: Temperature | UnsetType = UNSET
    """0 always picks the most likely token. If this field, `top_p`, `top_k`, `min_p` or
    `repeat_penalty` is omitted, the value that the model's file recommends is used."""
    top_p: Probability | UnsetType = UNSET
    """Sample from the most likely tokens that together have this probability."""
    top_k: TopK | UnsetType = UNSET
    """Sample only from this many of the most likely tokens; 0 means all."""
    min_p: Probability | UnsetType = UNSET
    """Leave out tokens whose probability is below this share of the most likely one's."""
    seed: Seed | None = None
    """With the same seed, a request usually gets the same answer. For exact repetition, use one
    slot and `cache_prompt: false`."""
    n: Choices = 1
    """The number of answers. The prompt is computed once; answer i uses `seed` + i."""
    stop: Stop | None = None
    """Texts that end the answer and are not part of it."""
    repeat_penalty: RepeatPenalty | UnsetType = UNSET
    """Above 1, tokens of the prompt and the answer become less likely."""
    presence_penalty: Penalty = 0.0
    """Above 0, tokens already used in the answer become less likely."""
    frequency_penalty: Penalty = 0.0
    """Above 0, a token becomes less likely each time it is used."""
    response_format: ResponseFormat | None = None
    """`json_schema`: JSON that matches a schema; `json_object`: any object; `grammar`: text that
    matches its GBNF `grammar`; `regex`: text that matches its `pattern`; `text`: any text."""
    logit_bias: LogitBias | None = None
    """Token ids, and the values added to their logits; -100 bans a token."""
    min_tokens: MinTokens = 0
    """The minimum length of the answer, in tokens."""
    ignore_eos: bool = False
    """Whether the answer continues until `max_tokens` or a stop, even if the model would end it."""
    stop_token_ids: StopTokenIds | None = None
    """Tokens that end the answer, besides those of the model. They are not part of it."""
    logprobs: bool = False
    """Whether to return the log probability of each token of the answer."""
    top_logprobs: TopLogprobs = 0
    """With `logprobs`, also return this many of the most likely tokens at each position."""
    adapter: AdapterName | None = None
    """The LoRA adapter to use; by default none."""
    cache_prompt: bool = True
    """`false` computes the whole prompt without the cache, and turns speculation off."""

    def __post_init__(self) -> None:
        form = self.response_format
        if isinstance(form, JsonObject) and form.source:
            named = JsonSchema(NamedSchema(form.source))
            msgspec.structs.force_setattr(self, "response_format", named)

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


_NO_SAMPLING = Sampling()


def check_options(task: Task, options: Sampling, top_n: int | None, returns: bool) -> None:
    """Raises: ValueError: one of the options has no effect on ``task``."""
    for name in () if task in TEXT_TASKS else Sampling.__struct_fields__:
        if getattr(options, name) != getattr(_NO_SAMPLING, name):
            raise ValueError(f"`{name}` applies only to text that is generated; leave it out")
    for name, is_set in (("top_n", top_n is not None), ("return_documents", returns)):
        if is_set and task != "rerank":
            raise ValueError(f"`{name}` applies only to `query` and `documents`; leave it out")


class ModelRequest(Sampling, frozen=True, kw_only=True, omit_defaults=True):
    """What a client asks of a model."""

    messages: Messages | None = None
    """A conversation, which is rendered with the model's chat template."""
    prompt: Prompt | None = None
    """A text to continue, without a chat template."""
    prompt_tokens: TokenIds | None = None
    """The tokens of a text to continue, instead of `prompt`. They are used unchanged."""
    tools: Tools | None = None
    """Functions that the model may call, in OpenAI's format."""
    tool_choice: ToolChoice = "auto"
    """`auto`, `none`, `required`, or the function that must be called, exactly once."""
    parallel_tool_calls: bool = True
    """`false` allows at most one call in an answer."""
    chat_template_kwargs: TemplateOptions | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""

    @property
    def offered_tools(self) -> Sequence[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def prompt_field(self) -> str:
        """The name of the field with the prompt."""
        names = ("messages", "prompt_tokens")
        return next((name for name in names if getattr(self, name) is not None), "prompt")

    @property
    def prompt_texts(self) -> list[str]:
        """Everything that becomes part of the prompt."""
        found = [self.prompt or ""]
        found += [text for message in self.messages or [] for text in message.texts]
        return found + [text for tool in self.offered_tools for text in tool.function.texts]


class InferenceRequest(ModelRequest, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a message on ``REQUESTS``. Its id, owner and priority are in the subject."""

    task: Task
    input: Inputs | None = None
    query: Text | None = None
    documents: Texts | None = None
    top_n: TopN | None = None
    return_documents: bool = False
    stream: bool = False
    """Whether token frames go to ``Reply-To`` too."""
    queued_at: str | None = None
    via: Via | None = None
    metadata: Metadata | UnsetType = UNSET
    retry_of: JobId | None = None
    model: str | None = None
    """What users call the model; the subject holds its token."""
    preview: str = ""
    """The beginning of what is asked, for lists of jobs; empty where requests are not kept."""
    says_sampling: bool = False
    """Whether a value of `SamplingDefaults` that is missing was not sent by the client. Earlier
    versions also left out those that equal llama.cpp's defaults."""
    response: ResponseForm | None = None
    """Set if the job is a response of the Responses API."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task == "chat") != (self.messages is not None):
            raise ValueError("the task `chat` takes `messages`, and no other task does")
        prompts = sum(one is not None for one in (self.prompt, self.prompt_tokens))
        if prompts != (self.task == "complete"):
            raise ValueError(
                "the task `complete` takes a `prompt` or `prompt_tokens`, and no other task does"
            )
        if (self.task == "embed") != (self.input is not None):
            raise ValueError("the task `embed` takes `input`, and no other task does")
        for ranked in (self.query, self.documents):
            if (self.task == "rerank") != (ranked is not None):
                raise ValueError(
                    "the task `rerank` takes `query` and `documents`, and no other task does"
                )
        check_options(self.task, self, self.top_n, self.return_documents)
        check_times(self.queued_at)

    def with_said_sampling(self) -> "InferenceRequest":
        """The request as the version that wrote it meant it: what an earlier one left out is
        llama.cpp's default, not the model's."""
        if self.says_sampling or self.task not in TEXT_TASKS:
            return self
        defaults = msgspec.structs.asdict(SamplingDefaults())
        missing = {name: defaults[name] for name in defaults if getattr(self, name) is UNSET}
        return msgspec.structs.replace(self, **missing, says_sampling=True)

    def work(self, n_ctx: int) -> "Work":
        """How much there is to do for a model with ``n_ctx`` tokens of context."""
        # The query goes through the model with each document.
        queries = utf8_bytes(self.query or "") * len(self.documents or [])
        return Work(
            prompt_bytes=sum(map(utf8_bytes, self.prompt_texts + (self.documents or [])))
            + sum(map(input_bytes, self.input or []))
            + input_bytes(self.prompt_tokens or [])
            + queries,
            max_tokens=min(self.max_tokens or n_ctx, n_ctx) if self.task in TEXT_TASKS else 1,
            task=self.task,
            n=self.n,
        )


class Work(Struct, frozen=True, omit_defaults=True):
    """The size of a request, known before it runs. Estimates are learned from finished ones.
    ``max_tokens`` is that of each of the ``n`` answers."""

    prompt_bytes: Count
    max_tokens: AtLeastOne
    task: Task
    n: Choices = 1

    @property
    def most_tokens(self) -> int:
        """The most tokens of all answers together."""
        return self.n * self.max_tokens


def priority_of(token: str) -> Priority:
    """The priority that a subject names; one that does not exist counts as normal."""
    named: dict[str, Priority] = {"high": "high", "low": "low"}
    return named.get(token, "normal")


class RetryRequest(Struct, frozen=True):
    """``infer.retry.<model>.<id>``: an inferer asks a gateway for the job's next attempt.

    ``sequence`` is that of the message that the inferer holds, ``at`` when the attempt is due.
    """

    sequence: Count
    attempt: Count
    at: str

    def __post_init__(self) -> None:
        check_times(self.at)


class RetryScheduled(Struct, frozen=True):
    """The answer: the broker holds the schedule, or the job has ended meanwhile."""

    at: str


class IdempotencyEntry(Struct, frozen=True):
    """An entry of the bucket ``IDEMPOTENCY``: the job that a key stands for, and the SHA-256 of
    what was submitted under it."""

    id: str
    digest: str


class OrphanEntry(Struct, frozen=True):
    """An entry of the bucket ``IDEMPOTENCY``: a job whose client reached its timeout."""

    until: str
    """When the job is cancelled unless its client has come back; RFC 3339."""
