"""Conversations of one model: how its chat template takes them, and how its answers are written."""

import hashlib
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from services.inferer.bounded.chat_template import ChatTemplate
from services.inferer.engine.control_tokens import ControlTokens, Literals, Prompt
from shared.answers.calls import ID_CHARACTERS
from shared.answers.marks import (
    ARGS,
    CHANNEL,
    END_TOOL_CALL,
    HARMONY,
    HERMES,
    LLAMA,
    MESSAGE,
    MISTRAL,
    MISTRAL_ARGS,
    PYTHON_TAG,
    REASONING,
    TOOL_CALL,
    TOOL_CALLS,
)
from shared.errors import InvalidRequest
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.inferers import MAX_TEMPLATE_OPTIONS
from shared.wire.requests import ChatMessage, ModelRequest, Role
from shared.wire.tools import FunctionCall, Tool, ToolCall

PROBE = "probe4711"
"""Looked for in what a template renders from it."""
PROBE_CALL = ToolCall("probe4711", FunctionCall(PROBE, "{}"))
WRITTEN = re.compile(rf'{TOOL_CALL}\s*\{{\s*"name"\s*:\s*"{PROBE}"')
"""Some templates write other things than JSON between these marks: Qwen3 Coder, GLM."""
GIVEN = {
    "messages",
    "bos_token",
    "eos_token",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "namespace",
    "range",
    "loop",
}
"""Variables of templates that are no options."""

INSTRUCTIONS = """\
You can call these functions. To call one, write a line of JSON between two tags, and nothing else:
<tool_call>
{{"name": "<name of the function>", "arguments": {{<its arguments>}}}}
</tool_call>
The functions, one per line, with the JSON schema of their arguments:
{tools}"""


class ChatPrompt(NamedTuple):
    prompt: Prompt
    opened: str = ""
    """What opens the model's reasoning, if that is the end of the prompt."""
    is_closed: bool = False
    """Whether the end of the prompt rules reasoning out."""


class Chat:
    """A chat template, and what is known of it. May be used from several threads at once."""

    def __init__(
        self, source: str, bos_token: str, eos_token: str, control_tokens: ControlTokens
    ) -> None:
        """``source`` is the template.

        Raises:
            OSError, ModelError: its process could not be started.
            ValueError, InvalidRequest: the template is not valid.
        """
        self._template = ChatTemplate(source, bos_token, eos_token)
        self._control_tokens = control_tokens
        self.format = PLAIN
        """Of answers to requests with tools."""
        self.options: list[str] = []
        """What ``chat_template_kwargs`` may have."""
        try:
            self._probe_template(source)
        except BaseException:
            self.close()
            raise

    def _probe_template(self, source: str) -> None:
        self._is_typed = self._wants_parts()
        self._takes_system = PROBE in self._probe(("system", PROBE), ("user", "Hi"))
        syntax = self._tool_syntax(source)
        self._takes_tools = syntax != ""
        self.format = AnswerFormat(_reasoning(source), syntax or HERMES)
        names = [name for name in self._template.options() if name not in GIVEN]
        self.options = [name for name in names if len(name) <= 64][:MAX_TEMPLATE_OPTIONS]

    def prompt(self, request: ModelRequest, cancelled: threading.Event) -> ChatPrompt:
        """The prompt of a conversation. Takes up to `RENDER_S` seconds.

        Raises:
            InvalidRequest: the template refuses the conversation.
            Cancelled: ``cancelled`` was set.
        """
        literals = self._control_tokens.literals()
        messages, tools = list(request.messages or []), None
        if self._takes_tools:
            tools = [_definition(tool) for tool in request.offered_tools] or None
        else:
            messages = self._in_words(messages, request.offered_tools)
        names = {
            call.id: call.function.name for message in messages for call in message.tool_calls or []
        }
        try:
            rendered = [self._rendered(message, names, literals) for message in messages]
            hidden_tools = literals.hide_all(tools)
        except RecursionError:
            raise InvalidRequest(
                "messages: tool calls or tools are nested too deeply", "messages"
            ) from None
        text = self._template.render(
            rendered,
            cancelled,
            tools=hidden_tools,
            options=literals.hide_all(request.chat_template_kwargs),
        )
        opened, is_closed = "", False
        if marks := REASONING.get(self.format.reasoning):
            opening, closing = map(re.escape, marks)
            if found := re.search(rf"{opening}\s*\Z", text):
                opened = found[0]
            is_closed = re.search(rf"{closing}\s*\Z", text) is not None
        return ChatPrompt(Prompt(literals.pieces(text)), opened, is_closed)

    def close(self) -> None:
        self._template.close()

    def _rendered(
        self, message: ChatMessage, names: dict[str, str], literals: Literals
    ) -> dict[str, Any]:
        """A message as templates expect it. ``names`` are those of the called functions by the id
        of the call."""
        text = literals.hide(message.text)
        found: dict[str, Any] = {
            "role": message.role,
            "content": [{"type": "text", "text": text}] if self._is_typed else text,
        }
        name = message.name or names.get(message.tool_call_id or "")
        if name:
            found["name"] = literals.hide(name)
        if message.tool_calls:
            found["tool_calls"] = [self._call(call, literals) for call in message.tool_calls]
        if message.tool_call_id:
            found["tool_call_id"] = self._id(message.tool_call_id, literals)
        if message.reasoning_content:
            found["reasoning_content"] = literals.hide(message.reasoning_content)
            if not (message.tool_calls and text):  # which the template of gpt-oss refuses
                found["thinking"] = found["reasoning_content"]
        return found

    def _call(self, call: ToolCall, literals: Literals) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves."""
        function = {"name": call.function.name, "arguments": _decoded(call.function)}
        return {
            "id": self._id(call.id, literals),
            "type": "function",
            "function": literals.hide_all(function),
        }

    def _id(self, call_id: str, literals: Literals) -> str:
        """Templates of Mistral refuse ids that are not as long as its own."""
        is_own = len(call_id) == ID_CHARACTERS and call_id.isalnum()
        if self.format.tools in (MISTRAL, MISTRAL_ARGS) and not is_own:
            return hashlib.sha256(call_id.encode()).hexdigest()[:ID_CHARACTERS]
        return literals.hide(call_id)

    def _in_words(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> list[ChatMessage]:
        """A conversation for a template that does not know tools, or whose model writes calls in a
        way that is not known: tools are explained in the system's message, and calls and results
        are text."""
        found: list[ChatMessage] = []
        for message, before in zip(messages, [None, *messages], strict=False):
            spoken = _spoken(message)
            if message.role == "tool" and before is not None and before.role == "tool":
                # Many templates take no two messages of a user in a row.
                spoken = ChatMessage("user", f"{found.pop().text}\n{spoken.text}")
            found.append(spoken)
        if not tools:
            return found
        definitions = (msgspec.json.encode(_definition(tool)["function"]) for tool in tools)
        words = INSTRUCTIONS.format(tools=b"\n".join(definitions).decode())
        role: Role = "system" if self._takes_system else "user"
        if found[0].role != role:
            return [ChatMessage(role, words), *found]
        parts = (found[0].text, words) if self._takes_system else (words, found[0].text)
        return [ChatMessage(role, "\n\n".join(parts)), *found[1:]]

    def _wants_parts(self) -> bool:
        """Whether the template takes the content of messages in parts only."""
        self._is_typed = False
        if PROBE in self._probe(("user", PROBE)):
            return False
        self._is_typed = True
        return PROBE in self._probe(("user", PROBE))

    def _tool_syntax(self, source: str) -> str:
        """How the template has its model write calls; empty if it takes no tools, or that is not
        known."""
        function = {"name": PROBE, "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": function}]
        if PROBE not in self._probe(("user", "Hi"), tools=tools):
            return ""
        if CHANNEL in source and MESSAGE in source:
            return HARMONY
        if TOOL_CALLS in source:
            return MISTRAL_ARGS if ARGS in source else MISTRAL
        if TOOL_CALL in source:
            calling = ChatMessage("assistant", tool_calls=[PROBE_CALL])
            called = self._probe(("user", "Hi"), calling, tools=tools)
            return HERMES if WRITTEN.search(called) else ""
        if '"parameters"' in source and (PYTHON_TAG in source or "<|start_header_id|>" in source):
            return LLAMA
        return ""

    def _probe(
        self, *messages: tuple[Role, str] | ChatMessage, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """What the template makes of a conversation; nothing if it refuses it."""
        literals = self._control_tokens.literals()
        conversation = [
            self._rendered(
                message if isinstance(message, ChatMessage) else ChatMessage(*message), {}, literals
            )
            for message in messages
        ]
        try:
            return self._template.render(conversation, threading.Event(), tools=tools)
        except InvalidRequest:
            return ""


def _reasoning(source: str) -> str:
    """How the template's model marks its reasoning."""
    if CHANNEL in source and MESSAGE in source:
        return HARMONY
    closing = {name: marks[1] for name, marks in REASONING.items()}
    return next((name for name, mark in closing.items() if mark in source), "")


def _definition(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": _schema(tool),
        },
    }


def _schema(tool: Tool) -> dict[str, Any]:
    """Raises: InvalidRequest: it cannot be read."""
    try:
        return tool.function.schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"tools: the parameters of {tool.function.name} cannot be read: {error}", "tools"
        ) from None


def _decoded(function: FunctionCall) -> dict[str, Any]:
    """Raises: InvalidRequest: the arguments are not an object."""
    try:
        return function.decoded_arguments
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"messages: the arguments of a call of {function.name} are not a JSON object",
            "messages",
        ) from None


def _spoken(message: ChatMessage) -> ChatMessage:
    """A message without calls, of a role that every template knows."""
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.text}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [
        msgspec.json.encode({"name": call.function.name, "arguments": _decoded(call.function)})
        for call in message.tool_calls
    ]
    lines = [message.text] if message.text else []
    lines += [f"{TOOL_CALL}\n{call.decode()}\n{END_TOOL_CALL}" for call in calls]
    return ChatMessage(message.role, "\n".join(lines), message.name)
