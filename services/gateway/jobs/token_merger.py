"""Merges token frames, which may be lost, repeated or from several attempts, into one text.

Several answers are one text, too, with a mark between them: so what a client has of them is as easy
to recognize as that of one answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import MAX_CHOICES
from shared.wire.results import Choice

NEXT_CHOICE = "\udcff"
"""Stands between two answers. It is in none: decoded UTF-8 has no surrogates."""


@dataclass(frozen=True)
class Added:
    """Text that follows what was sent before of the answer ``choice``; ``index`` is that of its
    first token in this answer. Tokens without text (half a character, the beginning of a stop
    string) belong to the text that follows them."""

    attempt: int
    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True)
class Restarted:
    """What was sent before is void: a later attempt came out differently. Its text follows."""

    attempt: int


Step = Added | Restarted


class Sent(NamedTuple):
    """What a client has of a text: enough to recognize it when it is read again."""

    attempt: int = 0
    """From which the text came."""
    tokens: int = 0
    """Of the answer that it has last."""
    characters: int = 0
    """With one between two answers."""
    checksum: int = 0
    """CRC-32 of its UTF-8, with the byte 255 between two answers."""

    def begins(self, text: str) -> bool:
        """Whether ``text`` begins with what was sent."""
        beginning = text[: self.characters]
        return len(beginning) == self.characters and _checksum(beginning) == self.checksum


NOTHING = Sent()
UNKNOWN = Sent(characters=1, checksum=-1)
"""Some text, with which none begins."""


@dataclass
class _Choice:
    """The tokens of one answer in the attempt that is read."""

    begin: int
    """The index of its first one, counted over all answers."""
    shown: int = 0
    """How many there are up to the last one that added text."""
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Empty if none were asked for."""


class TokenReader:
    """Follows the highest attempt, drops repeated tokens, and fills gaps from the result."""

    def __init__(self, sent: Sent = NOTHING) -> None:
        """``sent`` was sent before, by another reader. The text goes on after it, or starts again
        from the beginning where it turns out to be another."""
        self._attempt = 0
        self._next = 0
        self._text = ""
        self._choices = [_Choice(0)]
        self._sent = sent
        self._sent_text: str | None = None if sent.characters else ""
        """None until enough was read to know it."""
        self.has_gap = False
        """Whether the last frame came after one that is missing; it was not added."""

    @property
    def position(self) -> tuple[int, int]:
        """The attempt that it follows, and the index of the token that it expects next."""
        return self._attempt, self._next

    def tokens_of(self, choice: int) -> int:
        """How many tokens of an answer it has read."""
        begins = [one.begin for one in self._choices] + [self._next]
        return begins[choice + 1] - begins[choice] if choice < len(self._choices) else 0

    @property
    def sent(self) -> Sent:
        """What was sent so far."""
        return self._sent

    def add(self, frame: TokenFrame) -> list[Step]:
        """What to send on after ``frame``; nothing if it is late, repeated or beyond a gap."""
        if frame.attempt < self._attempt:
            return []
        if frame.attempt > self._attempt:
            self._attempt, self._next, self._text = frame.attempt, 0, ""
            self._choices = [_Choice(0)]
        self.has_gap = frame.index > self._next
        if self.has_gap:
            return []
        tokens = frame.tokens[self._next - frame.index :]
        if not tokens:
            return []
        self._begin_choices(frame.choice + 1)
        choice = self._choices[-1]
        for token in tokens:
            self._next += 1
            if token:
                choice.shown = self._next - choice.begin
        self._text += "".join(tokens)
        if frame.logprobs and len(frame.logprobs) == len(frame.tokens):
            choice.logprobs += frame.logprobs[-len(tokens) :]
        return self._send(self._text, complete=False)

    def finish(self, attempt: int, choices: Sequence[Choice]) -> list[Step]:
        """What to send on to end with ``choices``, which are the stored result's."""
        self._attempt = max(attempt, self._attempt)
        self._begin_choices(len(choices))
        for known, choice in zip(self._choices, choices, strict=False):
            if choice.logprobs is not None:
                known.logprobs, known.shown = [*choice.logprobs], len(choice.logprobs)
        return self._send(NEXT_CHOICE.join(choice.text for choice in choices), complete=True)

    def _begin_choices(self, count: int) -> None:
        """Have ``count`` answers, at least: the last one begins here."""
        missing = min(count, MAX_CHOICES) - len(self._choices)
        self._choices += [_Choice(self._next) for _ in range(missing)]
        self._text += NEXT_CHOICE * missing

    def _send(self, text: str, *, complete: bool) -> list[Step]:
        if self._attempt < self._sent.attempt and not complete:
            return []
        if self._sent_text is None:
            if len(text) < self._sent.characters and not complete:
                return []
            if self._sent.begins(text):
                self._sent_text = text[: self._sent.characters]
        if self._sent_text is not None and text.startswith(self._sent_text):
            return self._added(text[len(self._sent_text) :])
        if self._sent_text is not None and self._sent_text.startswith(text) and not complete:
            return []  # a repeated attempt that has not caught up yet
        self._sent_text, self._sent = "", Sent(self._attempt)
        return [Restarted(self._attempt), *self._added(text)]

    def _added(self, text: str) -> list[Step]:
        """What to send on of ``text``, which follows what was sent."""
        assert self._sent_text is not None
        steps: list[Step] = []
        if not text:
            return steps
        _, index, characters, checksum = self._sent
        first = self._sent_text.count(NEXT_CHOICE)
        for number, part in enumerate(text.split(NEXT_CHOICE), first):
            if number > first:
                index = 0
            choice = self._choices[number]
            if part:
                logprobs = (one for one in choice.logprobs[index : choice.shown] if one is not None)
                steps.append(Added(self._attempt, index, part, tuple(logprobs), number))
            index = max(index, choice.shown)
        self._sent_text += text
        self._sent = Sent(self._attempt, index, characters + len(text), _checksum(text, checksum))
        return steps


def _checksum(text: str, of_text_before: int = 0) -> int:
    return crc32(text.encode("utf-8", "surrogateescape"), of_text_before)
