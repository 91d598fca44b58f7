"""Turns the bytes of tokens into text that can be shown: whole characters, no stop strings."""

import codecs

from shared.partial_match import overlap


class Detokenizer:
    """Joins the bytes of one answer's tokens and returns the text that each of them completes.

    A token may end inside a character, and its text may be the beginning of a stop string: such
    text is buffered until the next tokens decide. Text that was returned is final.
    """

    def __init__(self, stop: list[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = ""
        self.stopped = False
        """Whether a stop string is complete."""

    def push(self, piece: bytes) -> str:
        """The text that ``piece`` completes; sets ``stopped`` if it completes a stop string."""
        return self._add(self._decoder.decode(piece))

    def flush(self) -> str:
        """What is still buffered, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.decode(b"", final=True)) + self._buffer
        self._buffer = ""
        return text

    def _add(self, text: str) -> str:
        if not self._stop:
            return text
        self._buffer += text
        # The stop string that ends first: the result must not depend on how the text was cut into
        # tokens.
        found = [
            (start + len(stop), start)
            for stop in self._stop
            if (start := self._buffer.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            text, self._buffer = self._buffer[: min(found)[1]], ""
            return text
        held = max(overlap(self._buffer, stop) for stop in self._stop)
        end = len(self._buffer) - held
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return text
