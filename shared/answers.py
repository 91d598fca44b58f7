"""Reads what a model wrote: reasoning, calls of tools, and what is left for the user.

Each family of models marks them in its own way (`AnswerFormat`). A text is read as it comes, and
what was read stays: whole and streamed answers are the same. What looks like a call and is none
counts as content, so nothing is lost.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from shared.partial_match import overlap
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.requests import ModelRequest
from shared.wire.tools import FunctionCall, ToolCall

THINK: Final = "think"
THINK_BRACKETS: Final = "think_brackets"
REASONING: Final = {THINK: ("<think>", "</think>"), THINK_BRACKETS: ("[THINK]", "[/THINK]")}
"""The marks around the reasoning that an answer begins with."""

HERMES: Final = "hermes"
"""``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen, SmolLM and others."""
LLAMA: Final = "llama"
"""The whole answer is ``{"name": …, "parameters": {…}}``: Llama 3."""
MISTRAL: Final = "mistral"
"""``[TOOL_CALLS][{"name": …, "arguments": {…}}]``"""
MISTRAL_ARGS: Final = "mistral_args"
"""``[TOOL_CALLS]name[ARGS]{…}``: later models of Mistral."""
HARMONY: Final = "harmony"
"""gpt-oss: channels for reasoning, calls and the rest."""

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"
PYTHON_TAG = "<|python_tag|>"
START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_RECIPIENT = re.compile(r"to=functions\.([a-zA-Z0-9_-]{1,64})")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARACTERS = 9
"""Of the id of a call: templates of Mistral take no others."""


def marks(format: AnswerFormat) -> list[str]:
    """What tells the parts of an answer apart. Some of it may be control tokens of the model."""
    reasoning = {**REASONING, HARMONY: (START, CHANNEL, MESSAGE, END, CONSTRAIN)}
    tools = {
        HERMES: (TOOL_CALL, END_TOOL_CALL),
        LLAMA: (PYTHON_TAG,),
        MISTRAL: (TOOL_CALLS,),
        MISTRAL_ARGS: (TOOL_CALLS, ARGS),
    }
    return [*reasoning.get(format.reasoning, ()), *tools.get(format.tools, ())]


def format_of(request: ModelRequest, format: AnswerFormat) -> AnswerFormat:
    """How a model with ``format`` writes its answer to ``request``: no template, no marks; and no
    calls of tools that it does not know of."""
    if request.messages is None:
        return PLAIN
    return AnswerFormat(format.reasoning, format.tools if request.offered_tools else "")


class Reasoning(NamedTuple):
    text: str


class Content(NamedTuple):
    text: str


class Call(NamedTuple):
    """``arguments`` is a JSON object."""

    name: str
    arguments: str


Part = Reasoning | Content | Call


class Answer(NamedTuple):
    """A whole answer, read."""

    reasoning: str
    content: str
    calls: list[Call]


def read_answer(text: str, format: AnswerFormat) -> Answer:
    reader = AnswerReader(format)
    parts = [*reader.add(text), *reader.finish()]
    return Answer(
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
        [part for part in parts if isinstance(part, Call)],
    )


def tool_call(call: Call, job_id: str, number: int) -> ToolCall:
    """The call with its id: the same one whenever and wherever the answer is read."""
    value = int.from_bytes(hashlib.sha256(f"{job_id} {number}".encode()).digest())
    digits = (_DIGITS[value // len(_DIGITS) ** place % len(_DIGITS)] for place in range(9))
    return ToolCall("".join(digits), FunctionCall(call.name, call.arguments))


class AnswerReader:
    """Reads one answer, piece by piece."""

    def __init__(self, format: AnswerFormat) -> None:
        self._tools = format.tools
        self._unread = ""
        self._is_final = False
        self._closings = 0
        """How many ends of a call were found in ``_unread`` that are inside it."""
        self._has_calls = False
        self._reasoning, self._content = _Trimmed(), _Trimmed()
        self._marks = REASONING.get(format.reasoning)
        self._to_call: str | None = None
        self._channel = ""
        self._state: Callable[[], Iterator[Part] | None]
        if format.reasoning == HARMONY:
            self._state = self._harmony_begin
        elif self._marks:
            self._state = self._begin
        elif format.tools:
            self._state = self._content_begin
        else:
            self._state = self._rest

    def add(self, text: str) -> list[Part]:
        """What is certain after ``text``, too."""
        self._unread += text
        return self._read()

    def finish(self) -> list[Part]:
        """What is left once the answer has ended."""
        self._is_final = True
        parts = self._read()
        if not self._has_calls:
            parts += self._shown(Content, self._content.rest())
        return parts

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        before = None
        while before != (before := (self._state, len(self._unread))):
            parts += self._state() or ()
        return parts

    # Each state reads from the beginning of what is unread, and may set the next one. None: it
    # needs more.

    def _rest(self) -> Iterator[Part]:
        """All the rest is content, as it is."""
        text, self._unread = self._unread, ""
        yield Content(text)

    def _begin(self) -> Iterator[Part] | None:
        assert self._marks is not None
        self._unread = self._unread.lstrip()
        opening = self._marks[0]
        if self._may_become(opening):
            return None
        if self._unread.startswith(opening):
            self._unread = self._unread.removeprefix(opening)
            self._state = self._reason
        else:
            self._state = self._content_begin
        return iter(())

    def _reason(self) -> Iterator[Part]:
        assert self._marks is not None
        text, mark = self._until(self._marks[1])
        if mark:
            self._state = self._content_begin
        yield from self._shown(Reasoning, self._reasoning.add(text))

    def _content_begin(self) -> Iterator[Part] | None:
        if self._tools == LLAMA:
            self._unread = self._unread.lstrip()
            if self._may_become(PYTHON_TAG):
                return None
            if self._unread.startswith(("{", PYTHON_TAG)):
                self._state = self._llama_calls
                return iter(())
        self._state = self._text
        return iter(())

    def _text(self) -> Iterator[Part]:
        next_states = {
            HERMES: (TOOL_CALL, self._hermes_call),
            LLAMA: (PYTHON_TAG, self._llama_calls),
            MISTRAL: (TOOL_CALLS, self._mistral_calls),
            MISTRAL_ARGS: (TOOL_CALLS, self._mistral_calls),
        }
        if self._tools not in next_states:
            text, self._unread = self._unread, ""
        else:
            mark, state = next_states[self._tools]
            text, found = self._until(mark)
            if found:
                self._state = state
                self._unread = mark + self._unread
        yield from self._shown(Content, self._content.add(text))

    def _hermes_call(self) -> Iterator[Part] | None:
        """A call ends with the first mark that follows a whole object: arguments may contain it."""
        ends = self._unread.split(END_TOOL_CALL)
        for number in range(self._closings + 1, len(ends)):
            inside = END_TOOL_CALL.join(ends[:number])
            calls = _calls(inside.removeprefix(TOOL_CALL))
            if calls is not None:
                self._unread = self._unread[len(inside) + len(END_TOOL_CALL) :]
                self._closings = 0
                self._state = self._text
                return self._called(calls)
        self._closings = len(ends) - 1
        return self._read_to_end(lambda text: _calls(text.removeprefix(TOOL_CALL)))

    def _llama_calls(self) -> Iterator[Part] | None:
        def read(text: str) -> list[Call] | None:
            return _several(text.removeprefix(PYTHON_TAG), needs_arguments=True)

        return self._read_to_end(read)

    def _mistral_calls(self) -> Iterator[Part] | None:
        return self._read_to_end(_mistral)

    def _harmony_begin(self) -> Iterator[Part] | None:
        if self._may_become(CHANNEL) or self._may_become(START):
            return None
        is_marked = self._unread.startswith((CHANNEL, START))
        self._state = self._harmony_header if is_marked else self._text
        return iter(())

    def _harmony_header(self) -> Iterator[Part] | None:
        header, found, rest = self._unread.partition(MESSAGE)
        if not found:
            return None  # cut off, or the end
        self._unread = rest
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._channel = channel[1] if channel else ""
        self._to_call = recipient[1] if recipient and self._tools else None
        self._state = self._harmony_call if self._to_call else self._harmony_text
        return iter(())

    def _harmony_text(self) -> Iterator[Part]:
        text, found = self._until(END, RETURN, CALL, START)
        if found:
            self._harmony_end(found)
        if self._channel == "analysis":
            yield from self._shown(Reasoning, self._reasoning.add(text))
        else:
            yield from self._shown(Content, self._content.add(text))

    def _harmony_call(self) -> Iterator[Part] | None:
        ends = [at for mark in (END, CALL, START) if (at := self._unread.find(mark)) >= 0]
        if not ends and not self._is_final:
            return None
        end = min(ends, default=len(self._unread))
        body, self._unread = self._unread[:end], self._unread[end:]
        self._harmony_end(self._until(END, CALL, START)[1])
        arguments = _arguments(_json(body))
        assert self._to_call is not None
        if arguments is None:
            return self._shown(Content, self._content.add(body))
        return self._called([Call(self._to_call, arguments)])

    def _harmony_end(self, mark: str) -> None:
        """A message has ended with ``mark``."""
        if mark == START:
            self._unread = START + self._unread
        self._state = self._harmony_header
        (self._reasoning if self._channel == "analysis" else self._content).separate()

    def _called(self, calls: Iterable[Call]) -> Iterator[Part]:
        self._has_calls = True
        self._content.separate()
        yield from calls

    def _read_to_end(self, read: Callable[[str], list[Call] | None]) -> Iterator[Part] | None:
        """What is left, once it is all there: calls, or content where ``read`` finds none."""
        if not self._is_final:
            return None
        text, self._unread = self._unread, ""
        calls = read(text)
        if calls is None:
            return self._shown(Content, self._content.add(text))
        return self._called(calls)

    @staticmethod
    def _shown(kind: Callable[[str], Part], text: str) -> Iterator[Part]:
        if text:
            yield kind(text)

    def _may_become(self, mark: str) -> bool:
        """Whether what is unread is only the beginning of ``mark`` so far."""
        return not self._is_final and mark != self._unread and mark.startswith(self._unread)

    def _until(self, *wanted: str) -> tuple[str, str]:
        """Read up to the first of the marks. Returns the text before it, and the mark; or an empty
        one, if there is none in what is certain."""
        found = [(at, mark) for mark in wanted if (at := self._unread.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            text, self._unread = self._unread[:at], self._unread[at + len(mark) :]
            return text, mark
        held = 0 if self._is_final else max(overlap(self._unread, mark) for mark in wanted)
        end = len(self._unread) - held
        text, self._unread = self._unread[:end], self._unread[end:]
        return text, ""


class _Trimmed:
    """A text without the white space around it."""

    def __init__(self) -> None:
        self._before = ""
        """White space that belongs to the text if more of it comes."""
        self._between = ""
        """What comes before the next paragraph, if there is one."""
        self._is_between = True

    def add(self, text: str) -> str:
        """What is certain to be part of it."""
        if self._is_between:
            text = text.lstrip()
            if not text:
                return ""
            self._before, self._is_between = self._between, False
        text = self._before + text
        shown = text.rstrip()
        self._before = text[len(shown) :]
        return shown

    def separate(self) -> None:
        """What comes next is another paragraph."""
        if not self._is_between:
            self._before, self._between, self._is_between = "", "\n\n", True

    def rest(self) -> str:
        """White space at the end, which is left out unless it is asked for here."""
        return self._before


def _json(text: str) -> Any:
    """What ``text`` says in JSON; None if it is something else."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None


def _arguments(value: Any) -> str | None:
    """Arguments of a call as a JSON object; None if they are something else."""
    if isinstance(value, str):
        value = _json(value) if value.strip() else {}
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else None


def _calls(text: str, *, needs_arguments: bool = False) -> list[Call] | None:
    """The call, or list of calls, in ``text``; None if it is something else."""
    value = _json(text)
    return _calls_in(value if isinstance(value, list) else [value], needs_arguments)


def _calls_in(values: Iterable[Any], needs_arguments: bool = False) -> list[Call] | None:
    calls = []
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return None
        missing: dict[str, Any] | None = None if needs_arguments else {}
        arguments = _arguments(value.get("arguments", value.get("parameters", missing)))
        if arguments is None:
            return None
        calls.append(Call(name, arguments))
    return calls or None


def _several(text: str, *, needs_arguments: bool) -> list[Call] | None:
    """One call, or several with semicolons or line breaks between them."""
    if (calls := _calls(text, needs_arguments=needs_arguments)) is not None:
        return calls
    for separator in (";", "\n"):
        values = [_json(part) for part in text.split(separator) if part.strip()]
        if values and (calls := _calls_in(values, needs_arguments)) is not None:
            return calls
    return None


def _mistral(text: str) -> list[Call] | None:
    """The calls in ``[TOOL_CALLS]…``, in either of the forms that Mistral's models use."""
    text = text.removeprefix(TOOL_CALLS)
    if ARGS not in text:
        return _calls(text)
    calls = []
    for one in text.split(TOOL_CALLS):
        name, _, rest = one.partition(ARGS)
        arguments = _arguments(_json(rest))
        # Some versions write an id between the two.
        name = name.partition("[CALL_ID]")[0].strip()
        if arguments is None or not _NAME.fullmatch(name):
            return None
        calls.append(Call(name, arguments))
    return calls
