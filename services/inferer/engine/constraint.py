"""Builds the grammar of an answer: JSON with a schema, tool calls, and reasoning before them.

A schema alone is compiled directly. Everything else is written in llguidance's dialect of Lark, in
the syntax of the model's family. If the model may choose, the text before a call is free. After the
mark that opens a call, only a call is possible.
"""

import json
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from services.inferer.engine.grammar import Grammar
from services.inferer.engine.model import Model
from shared.answers.marks import (
    ARGS,
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    END_TOOL_CALL,
    HARMONY,
    HERMES,
    LLAMA,
    MESSAGE,
    MISTRAL,
    MISTRAL_ARGS,
    PYTHON_TAG,
    REASONING,
    RETURN,
    START,
    TOOL_CALL,
    TOOL_CALLS,
)
from shared.bounded.process import LimitExceeded
from shared.errors import InvalidRequest
from shared.schemas.compiler import lark_json, lark_language
from shared.wire.answers import PLAIN
from shared.wire.requests import (
    GrammarFormat,
    JsonObject,
    JsonSchema,
    ModelRequest,
    RegexFormat,
)
from shared.wire.tools import ChosenTool, Tool

LONGEST_SCHEMA = 2**20
"""In bytes. Decoded, a schema can take ten times its size. Gateways accept only shorter ones."""
RESPONSE_FORMAT, TOOLS = "response_format", "tools"
ANY_OBJECT = {"type": "object"}
TRIALS_S = 10.0
"""The time limit for the schemas of all tools. Each has its own limits and takes milliseconds."""


def constraint(
    model: Model,
    request: ModelRequest,
    *,
    opened: bool = False,
    is_closed: bool = False,
    cancelled: threading.Event | None = None,
) -> Grammar | None:
    """The grammar of the answer to ``request``; None if any answer is allowed. ``opened`` and
    ``is_closed`` are whether the prompt has begun or ended the model's reasoning.

    Raises:
        InvalidRequest: a schema contradicts itself, is not supported, or is too large.
        Cancelled: ``cancelled`` was set.
    """
    rules = _Rules(model, request, cancelled)
    if not (rules.is_formatted or rules.tools):
        return None
    if rules.schema is not None and rules.format == PLAIN:
        return model.vocabulary.grammar_of_schema(rules.schema, RESPONSE_FORMAT)
    param = TOOLS if rules.tools else RESPONSE_FORMAT
    return model.vocabulary.grammar_of_lark(rules.text(opened, is_closed), param)


class _Rules:
    """Writes the grammar of one answer."""

    def __init__(
        self, model: Model, request: ModelRequest, cancelled: threading.Event | None
    ) -> None:
        self._model = model
        self._cancelled = cancelled
        self.format = model.answer_format(request)
        self.schema = self._enforced_schema(request)
        self._language = self._enforced_language(request)
        self.is_formatted = self.schema is not None or self._language is not None
        self.tools = _callable(request) if request.messages is not None else []
        self._must_call = request.tool_choice not in ("none", "auto")
        # A function that must be called is called once.
        is_chosen = isinstance(request.tool_choice, ChosenTool)
        self._many = "*" if request.parallel_tool_calls and not is_chosen else "?"
        self._lines: list[str] = []
        self._tried_s = 0.0
        self._not_first: list[str] = []
        """What free text must not begin with, white space aside."""

    def text(self, opened: bool, is_closed: bool) -> str:
        if self.schema is not None:
            self._lines.append(f"formatted: {lark_json(self.schema)}")
        if self._language is not None:
            self._lines.append(f"formatted: {self._language}")
        for number, tool in enumerate(self.tools):
            self._lines.append(f"arguments_{number}: {lark_json(self._parameters(tool))}")
        self._lines.append("WS: /[ \\n]{0,4}/")
        if self.format.reasoning == HARMONY:
            self._harmony()
        else:
            thought = self._thought(opened, is_closed)
            self._lines.append(f"answer: {self._answer()}")
            self._lines.append(f"start: {thought} answer")
        return "\n".join(self._lines)

    def _thought(self, opened: bool, is_closed: bool) -> str:
        """The reasoning before the answer."""
        found = REASONING.get(self.format.reasoning)
        if found is None or is_closed:
            return ""
        opening, closing = found
        self._lines.append(f"thought: {self._up_to('REASON', closing)} WS")
        if opened:
            return "thought"
        # Otherwise text could go on where reasoning begins.
        self._not_first.append(_escaped(opening))
        return f"(WS {self._mark(opening)} thought)?"

    def _answer(self) -> str:
        """What comes after the reasoning: text, JSON or calls."""
        if not self.tools:
            return "formatted"
        opening, call, separator = {
            HERMES: (TOOL_CALL, f"WS one WS {self._mark(END_TOOL_CALL)}", "WS"),
            LLAMA: ("", "one", ""),
            MISTRAL: (TOOL_CALLS, 'WS "[" one (", " one)* "]"', ""),
            MISTRAL_ARGS: (TOOL_CALLS, "one", ""),
        }[self.format.tools]
        key = "parameters" if self.format.tools == LLAMA else "arguments"
        for number, tool in enumerate(self.tools):
            name = tool.function.name
            if self.format.tools == MISTRAL_ARGS:
                one = f'"{name}" {self._mark(ARGS)} arguments_{number}'
            else:
                # In the parts that JSON under a schema has, which may be the other possibility.
                parts = ("{", '"name"', ": ", f'"{name}"', ", ", f'"{key}"', ": ")
                one = f'{" ".join(map(json.dumps, parts))} arguments_{number} "}}"'
            self._lines.append(f"one_{number}: {one}")
        self._lines.append(f"one: {_any(f'one_{number}' for number in range(len(self.tools)))}")
        if self.format.tools == MISTRAL and self._many == "?":
            call = 'WS "[" one "]"'
        can_repeat = self.format.tools in (HERMES, MISTRAL_ARGS)
        self._lines.append(f"call: {call}")
        if not opening:
            return self._llama_answer()
        mark = self._mark(opening)
        repeated = f"({separator} {mark} call){self._many}" if can_repeat else ""
        if self._many == "?":
            repeated = ""
        calls = f"{mark} call {repeated}"
        if self._must_call:
            return calls
        if self.is_formatted:
            return f"formatted | {calls}"
        if self._token(opening) is not None:
            text = self._free("TEXT", opening)
            return f"{text}? | {text}? {calls}"
        head = self._up_to("HEAD", opening)
        tail = self._free("TAIL", opening)
        if can_repeat and self._many == "*":
            return f"({head} call)* {tail}?"
        return f"{tail}? | {head} call"

    def _llama_answer(self) -> str:
        """A call is the whole answer."""
        tag = self._token(PYTHON_TAG)
        called = "call" if tag is None else f"<[{tag}]>? call"
        if self._must_call:
            return called
        if self.is_formatted:
            return f"formatted | {called}"
        # Text that begins with a brace is parsed as a call.
        self._not_first.append(r"\{")
        self._free("TEXT", PYTHON_TAG)
        return f"TEXT? | {called}"

    def _harmony(self) -> None:
        channel, message, constrain = map(self._mark, (CHANNEL, MESSAGE, CONSTRAIN))
        text = self._free("TEXT", START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
        body = self._up_to("BODY", END, START, CHANNEL, MESSAGE, CONSTRAIN, CALL, RETURN)
        next_one = f'{self._mark(START)} "assistant"'
        for name in ("analysis", "commentary"):
            self._lines.append(f'{name}: {channel} "{name}" {message} {body} {next_one}')
        last = [] if self._must_call and self.tools else ["final"]
        shown = "formatted" if self.is_formatted else f"{text}?"
        self._lines.append(f'final: {channel} "final" {message} {shown}')
        if self.tools:
            last.append("call")
            for number, tool in enumerate(self.tools):
                header = f'"{tool.function.name}" " "? ({constrain} "json")? {message}'
                self._lines.append(f"one_{number}: {header} arguments_{number}")
            ones = _any(f"one_{number}" for number in range(len(self.tools)))
            self._lines.append(f'call: {channel} "commentary to=functions." ({ones})')
        # Commentary is part of the answer, which must contain nothing but its format.
        before = "analysis" if self.is_formatted else "analysis | commentary"
        self._lines.append(f"start: ({before})* ({_any(last)})")

    def _mark(self, text: str) -> str:
        token = self._token(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def _token(self, text: str) -> int | None:
        """The control token of a mark; None if the mark consists of text tokens."""
        return self._model.control_token(text)

    def _up_to(self, name: str, mark: str, *without: str) -> str:
        """Any text without these marks, followed by ``mark``."""
        if self._token(mark) is not None:
            return f"{self._free(name, mark, *without)}? {self._mark(mark)}"
        # A rule with a suffix, because other rules match the longest text, which would include the
        # beginning of the mark.
        text = f"/(?s:.*)/{_excluding(without)}{self._without_first()}"
        self._lines.append(f"{name.lower()}[suffix={json.dumps(mark)}]: {text}")
        return name.lower()

    def _free(self, name: str, *without: str) -> str:
        """Any text except an empty one, without these marks. This also holds for control tokens,
        whose text would be parsed as a mark."""
        rule = f"{name}: /(?s:.+)/{_excluding(without)}{self._without_first()}"
        if rule not in self._lines:
            self._lines.append(rule)
        return name

    def _without_first(self) -> str:
        if not self._not_first:
            return ""
        return f" & ~/\\s*({'|'.join(self._not_first)})(?s:.*)/"

    def _enforced_schema(self, request: ModelRequest) -> dict[str, Any] | None:
        """The schema of the answer.

        Raises: InvalidRequest: it cannot be enforced."""
        schema = response_schema(request)
        if schema is None or schema is ANY_OBJECT:
            return schema
        try:
            reason = self._model.vocabulary.schema_error(schema, self._cancelled)
        except LimitExceeded as exceeded:
            reason = str(exceeded)
        if reason is not None:
            raise InvalidRequest(reason, RESPONSE_FORMAT)
        return schema

    def _enforced_language(self, request: ModelRequest) -> str | None:
        """The answer's grammar or regular expression, in Lark.

        Raises: InvalidRequest: it cannot be enforced."""
        form = request.response_format
        if not isinstance(form, GrammarFormat | RegexFormat):
            return None
        try:
            reason = self._model.vocabulary.language_error(form, self._cancelled)
        except LimitExceeded as exceeded:
            reason = str(exceeded)
        if reason is not None:
            raise InvalidRequest(f"{RESPONSE_FORMAT}: {reason}", RESPONSE_FORMAT)
        return lark_language(form)

    def _parameters(self, tool: Tool) -> dict[str, Any]:
        """The schema of the arguments, or of any object where it cannot be enforced.

        Raises: InvalidRequest: it must be enforced, and cannot be."""
        name = tool.function.name
        began = time.monotonic()
        try:
            schema = tool.function.schema
            reason = self._model.vocabulary.schema_error(schema, self._cancelled)
        except LimitExceeded as exceeded:
            # Not ignored, because many such schemas would keep this inferer busy.
            raise InvalidRequest(f"tools: the parameters of {name}: {exceeded}", TOOLS) from None
        except (ValueError, RecursionError) as error:
            reason = str(error)
        self._tried_s += time.monotonic() - began
        if self._tried_s > TRIALS_S:
            raise InvalidRequest(
                "tools: their parameters take too long to compile; offer fewer or simpler tools",
                TOOLS,
            )
        if reason is None:
            return schema
        if tool.function.strict:
            raise InvalidRequest(f"tools: the parameters of {name}: {reason}", TOOLS)
        return ANY_OBJECT


def response_schema(request: ModelRequest) -> dict[str, Any] | None:
    """The schema of answers; None if any answer is allowed.

    Raises:
        InvalidRequest: it cannot be read, or is too large.
    """
    asked = request.response_format
    if isinstance(asked, JsonObject):
        return ANY_OBJECT
    if not isinstance(asked, JsonSchema):
        return None
    if len(asked.json_schema.source) > LONGEST_SCHEMA:
        raise InvalidRequest(f"the schema has more than {LONGEST_SCHEMA} bytes", RESPONSE_FORMAT)
    try:
        return asked.json_schema.schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema cannot be read: {error}", RESPONSE_FORMAT) from error


def _callable(request: ModelRequest) -> Sequence[Tool]:
    """The tools that the answer may call.

    Raises: InvalidRequest: the tool that must be called does not exist."""
    choice = request.tool_choice
    if not isinstance(choice, ChosenTool):
        return request.offered_tools
    chosen = [tool for tool in request.offered_tools if tool.function.name == choice.function.name]
    if not chosen:
        raise InvalidRequest(
            f"tool_choice: no tool has the name {choice.function.name}", "tool_choice"
        )
    return chosen


def _excluding(marks: Sequence[str]) -> str:
    if not marks:
        return ""
    return f" & ~/(?s:.*)({'|'.join(map(_escaped, marks))})(?s:.*)/"


def _escaped(mark: str) -> str:
    """``mark`` escaped for a regular expression."""
    return "".join(f"\\x{ord(character):02x}" for character in mark)


def _any(rules: Iterable[str]) -> str:
    return " | ".join(rules)
