"""From the bytes of tokens to text that may be shown: whole characters, no stop strings."""

import codecs


class TextAssembler:
    """Joins the bytes of one answer's tokens and says what text each of them sets free.

    A token may hold half a character, and its text may be the beginning of a stop string: such
    text waits until it is known. What was set free is never taken back.
    """

    def __init__(self, stop: list[str]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that ``piece`` sets free; sets ``stopped`` when it completes a stop string."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """What was held back and turned out to be nothing special."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        self._held += text
        # The one that ends first, so that it does not matter how the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            free, self._held = self._held[: min(found)[1]], ""
            return free
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        free, self._held = self._held[:cut], self._held[cut:]
        return free


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
