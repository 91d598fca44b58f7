"""The body of `POST /v1/responses`, and its conversion to a job."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.gateway.http.openai.responses.ids import job_of_response
from services.gateway.http.openai.responses.items import check_kind, decode_at, is_given, is_string
from services.gateway.http.openai.responses.parameters import OWN, PARAMETERS
from shared.errors import InvalidRequest, UnknownResponse
from shared.wire.api import JobSubmission, TimeoutS
from shared.wire.fields import Count, Metadata
from shared.wire.requests import (
    AdapterName,
    ChatMessage,
    JsonObject,
    JsonSchema,
    LogitBias,
    MaxTokens,
    MinTokens,
    NamedSchema,
    Penalty,
    Priority,
    Probability,
    RepeatPenalty,
    ResponseFormat,
    SchemaSource,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    TemplateOptions,
    TopK,
    TopLogprobs,
)
from shared.wire.responses import Label, ReasoningEffort, ResponseForm
from shared.wire.tools import ChosenFunction, ChosenTool, Function, Tool, ToolChoice, ToolName

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = {
    LOGPROBS: "the log probabilities of the answer",
    "reasoning.encrypted_content": "accepted: reasoning is returned as text, and can be sent back",
}
"""The possible values of `include`."""

SAME = ("model", "parallel_tool_calls", "temperature", "top_p", "metadata", *OWN)
"""Parameters that a job has under the same name."""

EMPTY = (b"null", b"[]", b"{}")
MAX_EMPTY_BYTES = 64
"""The most bytes, with white space, of an empty value."""


class TextFormat(Struct, frozen=True):
    type: Literal["text"]


class SchemaFormat(Struct, frozen=True):
    """OpenAI's flat form of a `JsonSchema`."""

    type: Literal["json_schema"]
    name: str
    source: SchemaSource = msgspec.field(name="schema")
    description: str | None = None
    strict: bool | None = None


class ObjectFormat(Struct, frozen=True):
    type: Literal["json_object"]


FORMATS: dict[str, Any] = {
    "text": TextFormat,
    "json_schema": SchemaFormat,
    "json_object": ObjectFormat,
}


class TextOptions(Struct, frozen=True, forbid_unknown_fields=True):
    format: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] | UnsetType = UNSET
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The earlier name of ``summary``."""
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard", "pro"] | None = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class FunctionTool(Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's flat form of a `Tool`."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] | UnsetType = UNSET
    strict: bool | None = None


class NamedFunction(Struct, frozen=True):
    type: Literal["function"]
    name: ToolName


class AllowedTools(Struct, frozen=True):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


CHOICES: dict[str, Any] = {"function": NamedFunction, "allowed_tools": AllowedTools}


class ResponseSubmission(
    JobSubmission, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A job that is a response. Only gateways make such jobs."""

    response: ResponseForm

    @property
    def keeps_request(self) -> bool:
        return self.response.store


Unsupported = Raw | UnsetType
"""A parameter that is refused unless it is empty, and so is never decoded."""


class ResponseRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body. `PARAMETERS` defines how each field is handled."""

    model: str | None = None
    input: Raw
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Raw] | None = None
    tool_choice: Raw | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    metadata: Metadata | UnsetType = UNSET
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None

    stream_options: StreamOptions | None = None
    truncation: Literal["disabled", "auto"] | None = None
    max_tool_calls: Count | None = None
    service_tier: str | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None

    prompt_cache_options: Unsupported = UNSET
    access_programs: Unsupported = UNSET
    background_options: Unsupported = UNSET
    context_management: Unsupported = UNSET
    conversation: Unsupported = UNSET
    image: Unsupported = UNSET
    moderation: Unsupported = UNSET
    prompt: Unsupported = UNSET

    top_k: TopK | None = None
    min_p: Probability | None = None
    repeat_penalty: RepeatPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    cache_prompt: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    adapter: AdapterName | None = None
    timeout_s: TimeoutS | None = None
    priority: Priority | None = None

    def check(self) -> None:
        """Raises: InvalidRequest: a parameter, or a value of it, is not supported."""
        for name, parameter in PARAMETERS.items():
            if parameter.handling == "refused" and _is_set(getattr(self, name)):
                raise _unsupported(name, parameter.note)
        if self.background and self.store is False:
            raise InvalidRequest(
                "background: cannot be combined with `store: false`; leave one of them out",
                "background",
            )
        if self.truncation == "auto":
            raise _unsupported("truncation", "send a shorter `input`", "auto")
        if self.service_tier not in (None, "auto", "default"):
            raise _unsupported("service_tier", "use `priority` instead", self.service_tier)
        for number, name in enumerate(self.include or []):
            if name not in INCLUDABLE:
                known = " or ".join(INCLUDABLE)
                raise InvalidRequest(
                    f"include[{number}]: {name[:80]!r} is not supported; use {known}",
                    f"include[{number}]",
                )
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequest(f'top_logprobs: needs "{LOGPROBS}" in `include`', "top_logprobs")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise _unsupported(
                "text.verbosity", "use the `instructions` instead", self.text.verbosity
            )
        self._check_reasoning()

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in (self.include or [])

    @property
    def previous(self) -> str | None:
        """The job of the previous response.

        Raises:
            UnknownResponse: the id is not one of a response.
        """
        if self.previous_response_id is None:
            return None
        job_id = job_of_response(self.previous_response_id)
        if job_id is None:
            raise UnknownResponse(
                f"previous_response_id: {self.previous_response_id[:80]!r} is not the id of a "
                "response",
                "previous_response_id",
            )
        return job_id

    def submission(
        self, history: Sequence[ChatMessage], asked: Sequence[ChatMessage]
    ) -> ResponseSubmission:
        """The job for the messages of the input (``asked``), which follow those of the earlier
        responses (``history``).

        Raises:
            InvalidRequest: the tools, their choice or the format are not valid.
        """
        instructions = (
            [] if self.instructions is None else [ChatMessage("system", self.instructions)]
        )
        tools, choice = self._tools()
        options: dict[str, Any] = {name: getattr(self, name) for name in SAME}
        return ResponseSubmission(
            messages=[*instructions, *history, *asked],
            max_tokens=self.max_output_tokens,
            tools=tools or None,
            tool_choice=choice,
            response_format=self._format(),
            logprobs=self.has_logprobs,
            top_logprobs=self.top_logprobs or 0,
            response=self._form(bool(instructions), len(instructions) + len(history)),
            chat_template_kwargs=self._template_options() or None,
            **{name: value for name, value in options.items() if value is not None},
        )

    def _form(self, has_instructions: bool, history: int) -> ResponseForm:
        reasoning = self.reasoning or ReasoningOptions()
        return ResponseForm(
            has_instructions=has_instructions,
            history=history,
            previous=self.previous,
            background=bool(self.background),
            store=self.store is not False,
            effort=reasoning.effort,
            summary="auto" if reasoning.summary or reasoning.generate_summary else None,
            max_tool_calls=self.max_tool_calls,
            user=self.user,
            safety_identifier=self.safety_identifier,
            prompt_cache_key=self.prompt_cache_key,
        )

    def _check_reasoning(self) -> None:
        options = self.reasoning or ReasoningOptions()
        for name, allowed, instead in (
            ("summary", "auto", "the output contains the full reasoning"),
            ("generate_summary", "auto", "the output contains the full reasoning"),
            ("context", "auto", "send the reasoning that the model should see as items"),
            ("mode", "standard", "leave it out"),
        ):
            value = getattr(options, name)
            if value not in (None, allowed):
                raise _unsupported(f"reasoning.{name}", instead, value)

    def _template_options(self) -> TemplateOptions:
        effort = self.reasoning.effort if self.reasoning else None
        options: TemplateOptions = {}
        if effort == "none":
            options["enable_thinking"] = False
        elif effort is not None:
            options["reasoning_effort"] = effort
        return options | (self.chat_template_kwargs or {})

    def _format(self) -> ResponseFormat | None:
        source = self.text.format if self.text else UNSET
        if not is_given(source):
            return None
        kind = check_kind(source, "text.format", list(FORMATS))
        form = decode_at(source, FORMATS[kind], "text.format")
        if isinstance(form, SchemaFormat):
            return JsonSchema(NamedSchema(form.source, form.name, form.description, form.strict))
        return JsonObject() if isinstance(form, ObjectFormat) else None

    def _tools(self) -> tuple[list[Tool], ToolChoice]:
        """The tools, and whether the model must call one."""
        tools = []
        for number, source in enumerate(self.tools or []):
            param = f"tools[{number}]"
            check_kind(source, param, ["function"])
            tool = decode_at(source, FunctionTool, param)
            function = Function(tool.name, tool.description, tool.parameters, tool.strict)
            tools.append(Tool("function", function))
        if not is_given(self.tool_choice):
            return tools, "auto"
        if is_string(self.tool_choice):
            known: Any = Literal["none", "auto", "required"]
            return tools, decode_at(self.tool_choice, known, "tool_choice")
        kind = check_kind(self.tool_choice, "tool_choice", list(CHOICES))
        choice = decode_at(self.tool_choice, CHOICES[kind], "tool_choice")
        if isinstance(choice, NamedFunction):
            return tools, ChosenTool("function", ChosenFunction(choice.name))
        names = {tool.function.name for tool in tools}
        for number, allowed in enumerate(choice.tools):
            if allowed.name not in names:
                param = f"tool_choice.tools[{number}].name"
                raise InvalidRequest(
                    f"{param}: no tool has the name {allowed.name}; the tools are "
                    f"{', '.join(sorted(names)) or 'none'}",
                    param,
                )
        allowed_names = {allowed.name for allowed in choice.tools}
        offered = [tool for tool in tools if tool.function.name in allowed_names]
        if not offered and choice.mode == "required":
            raise InvalidRequest(
                "tool_choice.tools: empty, although a tool must be called", "tool_choice.tools"
            )
        return offered, choice.mode


def _is_set(value: Raw | UnsetType) -> bool:
    if value is UNSET:
        return False
    return len(value) > MAX_EMPTY_BYTES or b"".join(bytes(value).split()) not in EMPTY


def _unsupported(param: str, instead: str, value: Any = None) -> InvalidRequest:
    what = param if value is None else f"{param} {value[:80]!r}"
    return InvalidRequest(f"{what} is not supported: {instead}", param)
