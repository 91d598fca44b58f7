"""Merges token frames, which may be lost, repeated or from several attempts, into one text."""

from dataclasses import dataclass

from shared.wire.events import TokenFrame


@dataclass(frozen=True)
class Added:
    """Text that follows what was sent before; ``index`` is that of its first token."""

    attempt: int
    index: int
    text: str


@dataclass(frozen=True)
class Restarted:
    """What was sent before is void: a later attempt came out differently. Its text follows."""

    attempt: int


Step = Added | Restarted


class TokenReader:
    """Follows the highest attempt, drops repeated tokens, and fills gaps from the result."""

    def __init__(self, *, resumes: bool = False) -> None:
        """With ``resumes``, unknown text was sent before: the text starts again from the
        beginning, unless `begin` is called."""
        self._attempt = 0
        self._next = 0
        self._text = ""
        self._sent: str | None = None if resumes else ""
        self._sent_tokens = 0
        self.has_gap = False
        """Whether the last frame came after one that is missing; it was not added."""

    def begin(self) -> None:
        """Everything that was sent before is about to be added once more."""
        self._sent = ""

    def add(self, frame: TokenFrame) -> list[Step]:
        """What to send on after ``frame``; nothing if it is late, repeated or beyond a gap."""
        if frame.attempt < self._attempt:
            return []
        if frame.attempt > self._attempt:
            self._attempt, self._next, self._text = frame.attempt, 0, ""
        self.has_gap = frame.index > self._next
        if self.has_gap:
            return []
        tokens = frame.tokens[self._next - frame.index :]
        self._next += len(tokens)
        self._text += "".join(tokens)
        return self._send(self._text, complete=False)

    def finish(self, attempt: int, text: str) -> list[Step]:
        """What to send on to end with ``text``, which is the stored result's."""
        self._attempt = max(attempt, self._attempt)
        return self._send(text, complete=True)

    def _send(self, text: str, *, complete: bool) -> list[Step]:
        if self._sent is None:
            if not (text or complete):
                return []
        elif text.startswith(self._sent):
            added, self._sent = text[len(self._sent) :], text
            index, self._sent_tokens = self._sent_tokens, max(self._sent_tokens, self._next)
            return [Added(self._attempt, index, added)] if added else []
        elif self._sent.startswith(text) and not complete:
            return []  # a repeated attempt that has not caught up yet
        self._sent, self._sent_tokens = text, self._next
        restarted: list[Step] = [Restarted(self._attempt)]
        return restarted + ([Added(self._attempt, 0, text)] if text else [])
