"""The body of `POST /v1/responses`, and its conversion to a job."""

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from services.gateway.http.openai.generation import GenerationRequest, template_options
from services.gateway.http.openai.parameters import RESPONSES, OtherParameters
from services.gateway.http.openai.responses.ids import job_of_response
from shared.errors import InvalidRequest, UnknownResponse
from shared.wire.api import Submission
from shared.wire.fields import Count
from shared.wire.requests import (
    ChatMessage,
    JsonSchema,
    MaxTokens,
    NamedSchema,
    ResponseFormat,
    SchemaSource,
    TemplateOptions,
    TopLogprobs,
)
from shared.wire.responses import Label, ReasoningEffort, ResponseForm
from shared.wire.strict import StrictJsonObject, StrictPlainText
from shared.wire.tools import (
    MAX_TOOLS,
    ChosenFunction,
    ChosenTool,
    Function,
    Parameters,
    Tool,
    ToolChoice,
    ToolName,
)

LOGPROBS: Literal["message.output_text.logprobs"] = "message.output_text.logprobs"
Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""What `include` may name. The second has no effect: reasoning is returned as text."""

_NAMES = {
    r"messages(\[.*|\..*)?": "input",
    r"logprobs": "top_logprobs",
    r"response_format(\..*)?": "text.format",
    r"(tools\[\d+\])\.function(.*)": r"\1\2",
}
"""Names of parameters of a job, and here."""


class SchemaFormat(
    Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True
):
    """OpenAI's flat form of a `JsonSchema`."""

    name: str
    source: SchemaSource = msgspec.field(name="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, frozen=True, forbid_unknown_fields=True):
    format: StrictPlainText | StrictJsonObject | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """All but ``effort`` may only ask for what happens anyway."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto"] | None = None
    """The reasoning itself is in the output."""
    generate_summary: Literal["auto"] | None = None
    """The earlier name of ``summary``."""
    context: Literal["auto"] | None = None
    """What the model sees of earlier reasoning is what is sent as items."""
    mode: Literal["standard"] | None = None


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class FunctionTool(
    Struct, frozen=True, tag_field="type", tag="function", forbid_unknown_fields=True
):
    """OpenAI's flat form of a `Tool`. The last four may only ask for what happens anyway."""

    name: ToolName
    description: str | None = None
    parameters: Parameters | UnsetType = UNSET
    strict: bool | None = None
    is_async: Literal[False] | None = msgspec.field(name="async", default=None)
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    output_schema: None = None


class NamedFunction(
    Struct, frozen=True, tag_field="type", tag="function", forbid_unknown_fields=True
):
    name: ToolName


class AllowedTools(
    Struct, frozen=True, tag_field="type", tag="allowed_tools", forbid_unknown_fields=True
):
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


ResponseToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


class ResponseSubmission(Submission, frozen=True, kw_only=True, omit_defaults=True):
    """A job that is a response. Only gateways make such jobs."""

    response: ResponseForm

    @property
    def keeps_request(self) -> bool:
        return self.response.store


class ResponseRequest(GenerationRequest, frozen=True, kw_only=True):
    others: ClassVar[OtherParameters] = RESPONSES

    input: str | Annotated[list[Raw], Meta(min_length=1)]
    """A text, or a list of messages, calls of functions, their outputs, reasoning and references to
    items of earlier responses."""
    instructions: str | None = None
    """What the model is told before `input`, in this response only."""
    previous_response_id: str | None = None
    """A response whose conversation goes on, as long as it and its request are kept."""
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call."""
    tool_choice: ResponseToolChoice | None = None
    """`auto`, `none`, `required`, the function that must be called, once, or `allowed_tools`."""
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    """`format`: what the answer must be, as in `response_format` of a chat. Of `verbosity` only
    `medium`."""
    reasoning: ReasoningOptions | None = None
    """`effort`, as an option of the model's chat template. The others only with the values that
    describe what happens anyway."""
    max_output_tokens: MaxTokens | None = None
    """The most tokens of an answer. More than the context has room for means: until it is full."""
    top_logprobs: TopLogprobs | None = None
    """How many of the likeliest tokens to list. Needs `include`."""
    include: list[Includable] | None = None
    """`message.output_text.logprobs`. `reasoning.encrypted_content` has no effect: reasoning is
    returned as text."""
    store: bool | None = None
    """`false`: the response cannot be read again, and its request is not kept."""
    background: bool | None = None
    """Whether the response is returned at once, and read later."""
    stream: bool | None = None
    """Whether the response comes as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """`include_obfuscation` has no effect: no event is padded."""
    max_tool_calls: Count | None = None
    """Only returned: it limits tools of OpenAI's, of which there are none here."""
    user: Label | None = None
    """Only returned, like the next two."""
    safety_identifier: Label | None = None
    """Only returned."""
    prompt_cache_key: Label | None = None
    """Only returned: the prompt cache works by itself."""
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    """As in `chat_template_kwargs`."""

    @property
    def own_format(self) -> dict[str, ResponseFormat | None]:
        form = self.text.format if self.text else None
        if isinstance(form, SchemaFormat):
            named = NamedSchema(form.source, form.name, form.description, form.strict)
            return {"text.format": JsonSchema(named)}
        return {"text.format": form}

    def check(self) -> None:
        """Raises: InvalidRequest: two parameters contradict each other."""
        if self.background and self.store is False:
            raise InvalidRequest(
                "background: cannot be combined with `store: false`; leave one of them out",
                "background",
            )
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidRequest(f'top_logprobs: needs "{LOGPROBS}" in `include`', "top_logprobs")

    def as_sent(self, error: InvalidRequest) -> InvalidRequest:
        renamed = super().as_sent(error)
        if renamed is not error:
            return renamed
        names = dict(_NAMES)
        if self.chat_template_kwargs is None:
            names["chat_template_kwargs"] = "reasoning.effort"
        param = error.param or ""
        for name, here in names.items():
            if (match := re.fullmatch(name, param)) is not None:
                sent = match.expand(here)
                # Not the same word within a sentence.
                message = re.sub(rf"(^|`){re.escape(param)}(?!\w)", rf"\1{sent}", error.message)
                message = re.sub(r"\bmax_tokens\b", "max_output_tokens", message)
                return type(error)(message, sent)
        return error

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
        effort = self.reasoning.effort if self.reasoning else None
        of_template = template_options(effort, self.enable_thinking, self.chat_template_kwargs)
        return ResponseSubmission(
            messages=[*instructions, *history, *asked],
            tools=tools or None,
            tool_choice=choice,
            logprobs=self.has_logprobs,
            top_logprobs=self.top_logprobs or 0,
            response=self._form(bool(instructions), len(instructions) + len(history)),
            chat_template_kwargs=of_template or None,
            **self._options("parallel_tool_calls"),
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
            summary=reasoning.summary or reasoning.generate_summary,
            max_tool_calls=self.max_tool_calls,
            user=self.user,
            safety_identifier=self.safety_identifier,
            prompt_cache_key=self.prompt_cache_key,
        )

    def _tools(self) -> tuple[list[Tool], ToolChoice]:
        """The tools that are offered, and whether one must be called."""
        tools = [
            Tool("function", Function(one.name, one.description, one.parameters, one.strict))
            for one in self.tools or []
        ]
        choice: ResponseToolChoice = self.tool_choice or "auto"
        if isinstance(choice, str):
            return tools, choice
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
