"""Guesses of the tokens that come next, looked up in the text so far. No runtime.

An answer often copies parts of its prompt, such as names, quotations or code, or repeats itself:
then what followed the same few tokens the last time follows again.
"""

LENGTHS = (3, 2)
"""How many of the last tokens are looked up: first so many, then fewer."""
LONGEST = max(LENGTHS)


class Lookup:
    """What followed the last few tokens of a text where they occurred before."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = [*tokens]
        self._next: dict[tuple[int, ...], int] = {}
        """The position after each n-gram's last occurrence that has a token after it."""
        self._indexed = 0
        self._index()

    def add(self, tokens: list[int]) -> None:
        """Take the tokens that follow."""
        self._tokens += tokens

    def continuation(self, count: int) -> list[int]:
        """``count`` tokens that may come next; empty if the last ones have not occurred together
        before."""
        self._index()
        tokens = self._tokens
        for length in LENGTHS:
            start = self._next.get(tuple(tokens[-length:]))
            if start is not None:
                # Where the text so far ends, what followed the last time repeats itself.
                period = len(tokens) - start
                return [tokens[start + offset % period] for offset in range(count)]
        return []

    def _index(self) -> None:
        tokens = self._tokens
        for position in range(self._indexed, len(tokens)):
            for length in LENGTHS:
                if position >= length:
                    self._next[tuple(tokens[position - length : position])] = position
        self._indexed = len(tokens)
