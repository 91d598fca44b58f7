"""Checks of tools, of their use in a conversation, and of options of chat templates."""

from collections.abc import Sequence

from msgspec import UNSET

from services.gateway.validation.schema_size import read_schema
from shared.errors import InvalidRequest
from shared.wire.api import JobSubmission
from shared.wire.inferers import ModelFacts
from shared.wire.requests import ChatMessage
from shared.wire.tools import ChosenTool, Tool

MAX_TOOLS_BYTES = 128 * 1024
"""Of the schemas of all parameters together."""

RESERVED_OPTIONS = ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt")
THINKING = "enable_thinking"


def check_tools(submission: JobSubmission) -> None:
    """Raises: InvalidRequest: tools, their choice or their calls and results are not as they should
    be."""
    tools = submission.tools or []
    if submission.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(submission, name):
                raise InvalidRequest(f"{name}: needs `messages`", name)
    names: set[str] = set()
    size = 0
    for number, tool in enumerate(tools):
        if tool.function.name in names:
            param = f"tools[{number}].function.name"
            raise InvalidRequest(f"{param}: there are two tools of this name", param)
        names.add(tool.function.name)
        size += _check_parameters(tool, f"tools[{number}].function.parameters")
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequest(
            f"tools: the parameters of all tools have {size} bytes, more than {MAX_TOOLS_BYTES}; "
            "offer fewer tools, or simpler ones",
            "tools",
        )
    _check_choice(submission, names)
    _check_messages(submission.messages or [])


def check_template(submission: JobSubmission, facts: ModelFacts) -> None:
    """Raises: InvalidRequest: the model cannot take the tools, or the options of its template."""
    if facts.format is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(submission, name):
                raise InvalidRequest(
                    f"{name}: the inferers of this model are of an earlier version, which ignores "
                    "it; upgrade them",
                    name,
                )
    for name, value in (submission.chat_template_kwargs or {}).items():
        # What does not think needs no option for that.
        is_known = name in facts.template_options or (name == THINKING and value is False)
        if name in RESERVED_OPTIONS or not is_known:
            known = ", ".join(sorted(facts.template_options)) or "none"
            raise InvalidRequest(
                f"chat_template_kwargs: the model's chat template has no option {name}; it has: "
                f"{known}",
                "chat_template_kwargs",
            )


def _check_parameters(tool: Tool, param: str) -> int:
    """Returns their size in bytes."""
    function = tool.function
    if function.parameters is UNSET:
        return 0
    schema = read_schema(function.parameters, lambda: function.schema, param)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f'{param}: its type must be "object"', param)
    return len(function.parameters)


def _check_choice(submission: JobSubmission, names: set[str]) -> None:
    choice = submission.tool_choice
    if choice in ("none", "auto"):
        return
    if not names:
        raise InvalidRequest("tool_choice: needs `tools`", "tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice: there is no tool named {choice.function.name}; there are "
            f"{', '.join(sorted(names))}",
            "tool_choice",
        )


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    calls: set[str] = set()
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        if message.tool_calls and message.role != "assistant":
            raise _misplaced(f"{param}.tool_calls", "only an assistant calls tools")
        for call_number, call in enumerate(message.tool_calls or []):
            calls.add(call.id)
            try:
                _ = call.function.decoded_arguments
            except (ValueError, RecursionError):
                field = f"{param}.tool_calls[{call_number}].function.arguments"
                raise _misplaced(field, "not a JSON object") from None
        if message.role == "tool" and message.tool_call_id is None:
            raise _misplaced(f"{param}.tool_call_id", "missing; it is the id of the call")
        if message.role != "tool" and message.tool_call_id is not None:
            raise _misplaced(f"{param}.tool_call_id", "only a message with the role tool has one")
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            raise _misplaced(f"{param}.tool_call_id", "no message before it has a call of this id")


def _misplaced(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {why}", param)
