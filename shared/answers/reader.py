"""Reads an answer piece by piece."""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from shared.answers.calls import (
    Call,
    arguments_in,
    hermes_calls,
    llama_calls,
    mistral_args_calls,
    mistral_calls,
)
from shared.answers.marks import (
    CALL,
    CHANNEL,
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
from shared.partial_match import overlap
from shared.wire.answers import AnswerFormat

MOST_ENDS = 64
"""How many marks inside a call are tried as its end: each takes a look at all of it."""
LONGEST_MARK = 20

_SPACE = re.compile(r"\s*")
_RECIPIENT = re.compile(r"to=functions\.([a-zA-Z0-9_-]{1,64})")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_END_MARKS = (END, RETURN, CALL, START)
"""Of a message of gpt-oss; the last one begins another."""


@lru_cache
def _any_of(*texts: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))


class Reasoning(NamedTuple):
    text: str


class Content(NamedTuple):
    text: str


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


class AnswerReader:
    """Reads one answer, piece by piece."""

    def __init__(self, format: AnswerFormat) -> None:
        self._tools = format.tools
        self._text = ""
        self._at = 0
        """Where what is unread begins in it."""
        self._is_final = False
        self._ends_tried = 0
        """How many marks at which a call could end were found to be inside it."""
        self._tried_to = 0
        """Where the last of them ends."""
        self._has_calls = False
        self._reasoning, self._content = _Trimmed(), _Trimmed()
        self._marks = REASONING.get(format.reasoning)
        self._to_call: str | None = None
        self._channel = ""
        self._state: Callable[[], Iterable[Part] | None]
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
        self._tried_to -= self._at
        self._text, self._at = self._text[self._at :] + text, 0
        return self._read()

    def finish(self) -> list[Part]:
        """What is left once the answer has ended."""
        self._is_final = True
        parts = self._read()
        if not self._has_calls:
            parts += _shown(Content, self._content.rest())
        return parts

    def _read(self) -> list[Part]:
        parts: list[Part] = []
        before = None
        while before != (before := (self._state, self._at)):
            parts += self._state() or ()
        return parts

    # Each state reads from where the unread text begins, and may set the next one. None: it needs
    # more.

    def _rest(self) -> Iterable[Part]:
        """All the rest is content, as it is."""
        return _shown(Content, self._take(len(self._text)))

    def _begin(self) -> Iterable[Part] | None:
        assert self._marks is not None
        self._skip_space()
        opening = self._marks[0]
        if self._may_become(opening):
            return None
        if self._skip(opening):
            self._state = self._reason
        else:
            self._state = self._content_begin
        return ()

    def _reason(self) -> Iterable[Part]:
        assert self._marks is not None
        text, mark = self._until(self._marks[1])
        if mark:
            self._state = self._content_begin
        return _shown(Reasoning, self._reasoning.add(text))

    def _content_begin(self) -> Iterable[Part] | None:
        if self._tools == LLAMA:
            self._skip_space()
            if self._may_become(PYTHON_TAG):
                return None
            if self._text.startswith(("{", PYTHON_TAG), self._at):
                self._state = self._llama_calls
                return ()
        self._state = self._content_text
        return ()

    def _content_text(self) -> Iterable[Part]:
        next_states = {
            HERMES: (TOOL_CALL, self._hermes_call),
            LLAMA: (PYTHON_TAG, self._llama_calls),
            MISTRAL: (TOOL_CALLS, self._mistral_calls),
            MISTRAL_ARGS: (TOOL_CALLS, self._mistral_calls),
        }
        if self._tools not in next_states:
            text = self._take(len(self._text))
        else:
            mark, state = next_states[self._tools]
            text, found = self._until(mark)
            if found:
                self._state = state
                self._at -= len(mark)
                self._tried_to = self._at
        return _shown(Content, self._content.add(text))

    def _hermes_call(self) -> Iterable[Part] | None:
        found = self._closed(_any_of(END_TOOL_CALL), hermes_calls)
        if found is not None:
            self._state = self._content_text
            return self._called(found)
        return self._read_to_end(hermes_calls)

    def _llama_calls(self) -> Iterable[Part] | None:
        return self._read_to_end(llama_calls)

    def _mistral_calls(self) -> Iterable[Part] | None:
        has_args = self._tools == MISTRAL_ARGS
        return self._read_to_end(mistral_args_calls if has_args else mistral_calls)

    def _harmony_begin(self) -> Iterable[Part] | None:
        if self._may_become(CHANNEL) or self._may_become(START):
            return None
        is_marked = self._text.startswith((CHANNEL, START), self._at)
        self._state = self._harmony_header if is_marked else self._content_text
        return ()

    def _harmony_header(self) -> Iterable[Part] | None:
        end = self._text.find(MESSAGE, self._at)
        if end < 0:
            is_header = self._text.startswith((CHANNEL, START), self._at)
            if is_header or not self._is_final:
                return None  # the message was cut off, or the answer has ended
            # The mark before it was part of a text.
            return _shown(Content, self._content.add(self._take(len(self._text))))
        header = self._take(end)
        self._at += len(MESSAGE)
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._channel = channel[1] if channel else ""
        self._to_call = recipient[1] if recipient and self._tools else None
        self._tried_to = self._at
        self._state = self._harmony_call if self._to_call else self._harmony_text
        return ()

    def _harmony_text(self) -> Iterable[Part]:
        text, mark = self._until(*_END_MARKS)
        if self._channel == "analysis":
            parts = _shown(Reasoning, self._reasoning.add(text))
        else:
            parts = _shown(Content, self._content.add(text))
        if mark:
            self._harmony_end(mark)
        return parts

    def _harmony_call(self) -> Iterable[Part] | None:
        def read(text: str) -> list[Call] | None:
            assert self._to_call is not None
            arguments = arguments_in(text)
            return None if arguments is None else [Call(self._to_call, arguments)]

        found = self._closed(_any_of(*_END_MARKS), read)
        if found is None:
            return self._read_to_end(read)
        self._harmony_end(self._text[: self._at][-len(START) :])
        return self._called(found)

    def _harmony_end(self, mark: str) -> None:
        """A message has ended with ``mark``."""
        if mark == START:
            self._at -= len(START)
        self._state = self._harmony_header
        (self._reasoning if self._channel == "analysis" else self._content).separate()

    def _called(self, calls: list[Call]) -> list[Call]:
        self._has_calls = True
        self._content.separate()
        return calls

    def _closed(
        self, ends: re.Pattern[str], read: Callable[[str], list[Call] | None]
    ) -> list[Call] | None:
        """The calls up to the first end at which there are any, as arguments may contain it; and
        go on after it. None while no end fits, or after `MOST_ENDS` tries."""
        while self._ends_tried < MOST_ENDS:
            end = ends.search(self._text, self._tried_to)
            if end is None:
                return None
            self._ends_tried += 1
            self._tried_to = end.end()
            calls = read(self._text[self._at : end.start()])
            if calls is not None:
                self._at, self._ends_tried = end.end(), 0
                return calls
        return None

    def _read_to_end(self, read: Callable[[str], list[Call] | None]) -> Iterable[Part] | None:
        """What is left, once it is all there: calls, or content where ``read`` finds none."""
        if not self._is_final or self._at == len(self._text):
            return None
        text = self._take(len(self._text))
        calls = read(text)
        if calls is None:
            return _shown(Content, self._content.add(text))
        return self._called(calls)

    def _take(self, end: int) -> str:
        """Read up to ``end``."""
        text, self._at = self._text[self._at : end], end
        return text

    def _skip(self, mark: str) -> bool:
        """Whether ``mark`` comes next; then it is read."""
        is_next = self._text.startswith(mark, self._at)
        self._at += len(mark) if is_next else 0
        return is_next

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _may_become(self, mark: str) -> bool:
        """Whether what is unread is only the beginning of ``mark`` so far."""
        left = len(self._text) - self._at
        is_short = left < len(mark) and not self._is_final
        return is_short and mark.startswith(self._text[self._at :])

    def _until(self, *marks: str) -> tuple[str, str]:
        """Read up to the first of the marks. Returns the text before it, and the mark; or an empty
        one, if there is none in what is certain."""
        if (found := _any_of(*marks).search(self._text, self._at)) is not None:
            text = self._take(found.start())
            self._at = found.end()
            return text, found[0]
        end = len(self._text)
        if not self._is_final:
            last = self._text[max(self._at, end - LONGEST_MARK) :]
            end -= max(overlap(last, mark) for mark in marks)
        return self._take(end), ""


def _shown(kind: Callable[[str], Part], text: str) -> list[Part]:
    return [kind(text)] if text else []


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
