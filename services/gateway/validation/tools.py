"""Checks of tools, of their use in a conversation, and of options of chat templates."""

from collections.abc import Sequence

from msgspec import UNSET

from services.gateway.validation.schema_size import MAX_DEPTH, is_deeper, read_schema
from shared.errors import InvalidRequest
from shared.wire.api import Submission
from shared.wire.inferers import ModelFacts
from shared.wire.requests import ChatMessage
from shared.wire.tools import ChosenTool, Tool

MAX_TOOLS_BYTES = 128 * 1024
"""Of the schemas of all parameters together."""

MAX_ARGUMENTS = 256 * 1024
"""Characters of the arguments of all tool calls in a conversation."""

RESERVED_OPTIONS = ("messages", "tools", "bos_token", "eos_token", "add_generation_prompt")
THINKING = "enable_thinking"


def check_tools(submission: Submission) -> None:
    """Raises: InvalidRequest: tools, their choice or their calls and results are not as they should
    be."""
    tools = submission.tools or []
    if submission.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(submission, name):
                raise InvalidRequest(f"{name}: can be used with `messages` only", name)
    _check_sizes(submission)
    names: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.function.name in names:
            param = f"tools[{number}].function.name"
            raise InvalidRequest(
                f"{param}: another tool has the same name; give each its own", param
            )
        names.add(tool.function.name)
        _check_parameters(tool, f"tools[{number}].function.parameters")
    _check_choice(submission, names)
    _check_messages(submission.messages or [])


def check_template(submission: Submission, facts: ModelFacts) -> None:
    """Raises: InvalidRequest: the model cannot take the tools, or the options of its template."""
    if facts.format is None:
        for name, is_used in (
            ("tools", submission.tools),
            ("chat_template_kwargs", submission.chat_template_kwargs),
            ("messages", any(map(_has_more_than_text, submission.messages or []))),
        ):
            if is_used:
                raise InvalidRequest(
                    f"{name}: the inferers of this model are of an earlier version, which does not "
                    "know tools and options of templates; upgrade them",
                    name,
                )
    for name, value in (submission.chat_template_kwargs or {}).items():
        # What does not think needs no option for that.
        is_known = name in facts.template_options or (name == THINKING and value is False)
        if name in RESERVED_OPTIONS or not is_known:
            known = ", ".join(sorted(facts.template_options)) or "no options"
            raise InvalidRequest(
                f"chat_template_kwargs: the model's chat template has no option {name}; it has: "
                f"{known}",
                "chat_template_kwargs",
            )


def _check_sizes(submission: Submission) -> None:
    """Before anything is decoded."""
    functions = [tool.function for tool in submission.tools or []]
    size = sum(len(one.parameters) for one in functions if one.parameters is not UNSET)
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequest(
            f"tools: the parameters of all tools have {size} bytes, more than {MAX_TOOLS_BYTES}; "
            "offer fewer tools, or simpler ones",
            "tools",
        )
    calls = [call for message in submission.messages or [] for call in message.tool_calls or []]
    size = sum(len(call.function.arguments) for call in calls)
    if size > MAX_ARGUMENTS:
        raise InvalidRequest(
            f"messages: the arguments of all tool calls have {size} characters, more than "
            f"{MAX_ARGUMENTS}; leave out old messages",
            "messages",
        )


def _check_parameters(tool: Tool, param: str) -> None:
    function = tool.function
    if function.parameters is UNSET:
        return
    schema = read_schema(function.parameters, lambda: function.schema, param)
    if schema["type"] != "object":
        raise InvalidRequest(f'{param}: its type must be "object"', param)


def _check_choice(submission: Submission, names: set[str]) -> None:
    choice = submission.tool_choice
    if choice in ("none", "auto"):
        return
    if not names:
        raise InvalidRequest("tool_choice: requires `tools`", "tool_choice")
    if isinstance(choice, ChosenTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice: no tool has the name {choice.function.name}; the tools are "
            f"{', '.join(sorted(names))}",
            "tool_choice",
        )


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    calls: set[str] = set()
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        if message.tool_calls and message.role != "assistant":
            raise _misplaced(
                f"{param}.tool_calls", "only a message with the role assistant has them"
            )
        for call_number, call in enumerate(message.tool_calls or []):
            calls.add(call.id)
            field = f"{param}.tool_calls[{call_number}].function.arguments"
            try:
                arguments = call.function.decoded_arguments
            except (ValueError, RecursionError):
                raise _misplaced(field, "not a JSON object") from None
            if is_deeper(arguments, MAX_DEPTH):
                raise _misplaced(field, f"nested more than {MAX_DEPTH} levels deep")
        if message.role == "tool" and message.tool_call_id is None:
            raise _misplaced(
                f"{param}.tool_call_id",
                "missing; set it to the id of the call that this is the result of",
            )
        if message.role != "tool" and message.tool_call_id is not None:
            raise _misplaced(f"{param}.tool_call_id", "only a message with the role tool has one")
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            raise _misplaced(
                f"{param}.tool_call_id", "no earlier message has a tool call with this id"
            )


def _misplaced(param: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {why}", param)


def _has_more_than_text(message: ChatMessage) -> bool:
    return bool(message.tool_calls or message.tool_call_id or message.reasoning_content)
