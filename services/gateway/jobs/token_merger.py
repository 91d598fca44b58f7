"""Merges token frames, which may be lost, repeated or from several attempts, into one text."""

from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob


@dataclass(frozen=True)
class Added:
    """Text that follows what was sent before; ``index`` is that of its first token. Tokens without
    text (half a character, the beginning of a stop string) belong to the text that follows them."""

    attempt: int
    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


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
    characters: int = 0
    checksum: int = 0
    """CRC-32 of its UTF-8."""

    def begins(self, text: str) -> bool:
        """Whether ``text`` begins with what was sent."""
        beginning = text[: self.characters]
        return len(beginning) == self.characters and _checksum(beginning) == self.checksum


NOTHING = Sent()
UNKNOWN = Sent(characters=1, checksum=-1)
"""Some text, with which none begins."""


class TokenReader:
    """Follows the highest attempt, drops repeated tokens, and fills gaps from the result."""

    def __init__(self, sent: Sent = NOTHING) -> None:
        """``sent`` was sent before, by another reader. The text goes on after it, or starts again
        from the beginning where it turns out to be another."""
        self._attempt = 0
        self._next = 0
        self._shown = 0
        """Tokens up to the last one that added text."""
        self._text = ""
        self._logprobs: list[TokenLogprob | None] = []
        """Of the tokens of this attempt; empty if none were asked for."""
        self._sent = sent
        self._sent_text: str | None = None if sent.characters else ""
        """None until enough was read to know it."""
        self.has_gap = False
        """Whether the last frame came after one that is missing; it was not added."""

    @property
    def position(self) -> tuple[int, int]:
        """The attempt that it follows, and the index of the token that it expects next."""
        return self._attempt, self._next

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
            self._shown, self._logprobs = 0, []
        self.has_gap = frame.index > self._next
        if self.has_gap:
            return []
        tokens = frame.tokens[self._next - frame.index :]
        for token in tokens:
            self._next += 1
            if token:
                self._shown = self._next
        self._text += "".join(tokens)
        if tokens and frame.logprobs and len(frame.logprobs) == len(frame.tokens):
            self._logprobs += frame.logprobs[-len(tokens) :]
        return self._send(self._text, complete=False)

    def finish(
        self, attempt: int, text: str, logprobs: list[TokenLogprob] | None = None
    ) -> list[Step]:
        """What to send on to end with ``text``; it and ``logprobs`` are the stored result's."""
        self._attempt = max(attempt, self._attempt)
        if logprobs is not None:
            self._logprobs, self._shown = [*logprobs], len(logprobs)
        return self._send(text, complete=True)

    def _send(self, text: str, *, complete: bool) -> list[Step]:
        if self._attempt < self._sent.attempt and not complete:
            return []
        if self._sent_text is None:
            if len(text) < self._sent.characters and not complete:
                return []
            if self._sent.begins(text):
                self._sent_text = text[: self._sent.characters]
        if self._sent_text is not None and text.startswith(self._sent_text):
            added = text[len(self._sent_text) :]
            return [self._added(added)] if added else []
        if self._sent_text is not None and self._sent_text.startswith(text) and not complete:
            return []  # a repeated attempt that has not caught up yet
        self._sent_text, self._sent = "", Sent(self._attempt)
        restarted: list[Step] = [Restarted(self._attempt)]
        return restarted + ([self._added(text)] if text else [])

    def _added(self, text: str) -> Added:
        assert self._sent_text is not None
        _, index, characters, checksum = self._sent
        self._sent_text += text
        self._sent = Sent(
            self._attempt,
            max(index, self._shown),
            characters + len(text),
            _checksum(text, checksum),
        )
        logprobs = (one for one in self._logprobs[index : self._shown] if one is not None)
        return Added(self._attempt, index, text, tuple(logprobs))


def _checksum(text: str, of_text_before: int = 0) -> int:
    return crc32(text.encode(), of_text_before)
