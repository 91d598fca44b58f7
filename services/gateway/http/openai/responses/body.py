"""The object `response`, which is returned and contained in events."""

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

from services.gateway.http.openai.responses.ids import response_id
from services.gateway.http.openai.responses.output import output_of
from shared.timestamps import parse_timestamp
from shared.wire.api import JobError, JobStatus
from shared.wire.fields import NO_METADATA, Metadata
from shared.wire.requests import JsonObject, JsonSchema, ModelRequest
from shared.wire.responses import ResponseForm
from shared.wire.results import Completed, Result, Usage
from shared.wire.tools import ChosenTool, Tool

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

EMPTY = Raw(b"{}")


class InputTokensDetails(Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True):
    """``reasoning_tokens`` is always 0, because they are not counted separately."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()

    @classmethod
    def of(cls, usage: Usage) -> "ResponseUsage":
        return cls(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            usage.total_tokens,
        )


class IncompleteDetails(Struct, frozen=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ReasoningBody(Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class TextBody(Struct, frozen=True):
    format: dict[str, Any]


class ResponseBody(Struct, frozen=True, kw_only=True):
    """A response. ``error`` has the code and the message of a job that did not complete, as in
    ``/status``. If the request is no longer kept, the fields that come from it are null or
    empty."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status = "queued"
    background: bool = False
    completed_at: int | None = None
    error: JobError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: Metadata
    model: str
    output: list[dict[str, Any]] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: ReasoningBody = ReasoningBody()
    safety_identifier: str | None = None
    service_tier: Literal["default"] = "default"
    store: bool = True
    temperature: float | None = None
    text: TextBody
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None

    @classmethod
    def queued(
        cls,
        *,
        job_id: str,
        model: str,
        queued_at: str,
        metadata: Raw | UnsetType,
        form: ResponseForm,
        request: ModelRequest | None,
    ) -> "ResponseBody":
        """A waiting response. ``request`` is None if it is not kept."""
        return cls(
            id=response_id(job_id),
            created_at=_seconds(queued_at),
            model=model,
            metadata=metadata if metadata and metadata != NO_METADATA else EMPTY,
            background=form.background,
            store=form.store,
            previous_response_id=response_id(form.previous) if form.previous else None,
            max_tool_calls=form.max_tool_calls,
            prompt_cache_key=form.prompt_cache_key,
            safety_identifier=form.safety_identifier,
            user=form.user,
            reasoning=ReasoningBody(form.effort, form.summary),
            **_of_request(request, form),
        )

    def in_progress(self) -> "ResponseBody":
        return replace(self, status="in_progress")

    def as_now(self, status: JobStatus) -> "ResponseBody":
        """The response while the job waits or runs."""
        return self if status.state == "PENDING" else self.in_progress()

    def ended(self, result: Result) -> "ResponseBody":
        """The response with the complete answer."""
        output = output_of(result) if isinstance(result, Completed) else []
        return self.ended_as(JobStatus.of(result), output)

    def ended_as(self, status: JobStatus, output: list[dict[str, Any]]) -> "ResponseBody":
        """The response with an ``output`` that was already read."""
        if status.result is None:
            ending: Status = "cancelled" if status.state == "REVOKED" else "failed"
            # The name of the job's field would not be that of a parameter here.
            error = status.error and replace(status.error, param=UNSET)
            return replace(self, status=ending, error=error)
        common = replace(self, output=output, usage=ResponseUsage.of(status.result.usage))
        if status.result.finish_reason == "length":
            return replace(common, status="incomplete", incomplete_details=IncompleteDetails())
        finished_at = _seconds(status.finished_at) if status.finished_at else None
        return replace(common, status="completed", completed_at=finished_at)


def _of_request(request: ModelRequest | None, form: ResponseForm) -> dict[str, Any]:
    if request is None:
        return {"text": TextBody({"type": "text"})}
    choice = request.tool_choice
    if isinstance(choice, ChosenTool):
        shown: Any = {"type": "function", "name": choice.function.name}
    else:
        shown = choice
    messages = request.messages or []
    return {
        "instructions": messages[0].text if form.has_instructions and messages else None,
        "max_output_tokens": request.max_tokens,
        "parallel_tool_calls": request.parallel_tool_calls,
        "temperature": None if request.temperature is UNSET else request.temperature,
        "top_p": None if request.top_p is UNSET else request.top_p,
        "top_logprobs": request.top_logprobs,
        "tool_choice": shown,
        "tools": [_tool(tool) for tool in request.tools or []],
        "text": TextBody(_format(request)),
    }


def _tool(tool: Tool) -> dict[str, Any]:
    function = tool.function
    parameters = None if function.parameters is UNSET else Raw(function.parameters)
    return {
        "type": "function",
        "name": function.name,
        "description": function.description,
        "parameters": parameters,
        "strict": function.strict,
    }


def _format(request: ModelRequest) -> dict[str, Any]:
    match request.response_format:
        case JsonSchema(named):
            return {
                "type": "json_schema",
                "name": named.name,
                "schema": named.source,
                "description": named.description,
                "strict": named.strict,
            }
        case JsonObject():
            return {"type": "json_object"}
    return {"type": "text"}


def _seconds(time: str) -> int:
    return int(parse_timestamp(time).timestamp())
