"""Guesses of the tokens that come next, looked up in the text so far and in earlier answers. No
runtime.

An answer often copies parts of its prompt, such as names, quotations or code, or repeats itself:
then what followed the same few tokens the last time follows again. And many answers of a queue
begin alike or have the same form, such as the keys of a JSON object.
"""

from collections import OrderedDict

LENGTHS = (3, 2)
"""How many of the last tokens are looked up in the text so far: first so many, then fewer."""
ANSWERS_LENGTH = 4
"""How many are looked up in earlier answers, in between: more, because those are other texts."""
LONGEST = max(*LENGTHS, ANSWERS_LENGTH)
CAPACITY = 32_768
"""N-grams of earlier answers that are kept, of all owners together."""


class Answers:
    """What followed the last few tokens in earlier answers, and in those that are being generated.
    Not thread-safe: the compute thread owns it.

    Only the next token is stored, and looked up again for the one after it. A reference to the text
    would keep all of a long answer for a single n-gram of it.
    """

    def __init__(self) -> None:
        self._next: OrderedDict[tuple[object, ...], int] = OrderedDict()
        """By `Sequence.cache_key` and n-gram, least recently written first."""

    def __len__(self) -> int:
        return len(self._next)

    def add(self, key: tuple[str, str], text: list[int]) -> None:
        """Take the last token of ``text``, a prompt with its answer so far."""
        ngram = (key, *text[-ANSWERS_LENGTH - 1 : -1])
        self._next[ngram] = text[-1]
        self._next.move_to_end(ngram)
        if len(self._next) > CAPACITY:
            self._next.popitem(last=False)

    def continuation(self, key: tuple[str, str], text: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens that may come next."""
        last = text[-ANSWERS_LENGTH:]
        found: list[int] = []
        while len(found) < count and (token := self._next.get((key, *last))) is not None:
            found.append(token)
            last = [*last, token][-ANSWERS_LENGTH:]
        return found


class Lookup:
    """What followed the last few tokens of a text where they occurred before. It is made from the
    prompt on any thread; then the compute thread owns it."""

    def __init__(
        self, prompt: list[int], answers: Answers | None = None, key: tuple[str, str] = ("", "")
    ) -> None:
        """``answers``: those that are looked up with ``key``, and to which the text's is added."""
        self._answers = answers
        self._key = key
        self._tokens = [*prompt]
        self._start = prompt[-LONGEST:]
        self._next: dict[tuple[int, ...], int] = {}
        """The position after each n-gram's last occurrence that has a token after it."""
        self._indexed = 0
        self._index()

    def add(self, token: int) -> None:
        """Take the next token of the answer."""
        self._tokens.append(token)
        if self._answers is not None:
            self._answers.add(self._key, self._tokens)

    def begin_next_answer(self) -> None:
        """Go back to the prompt. What is known of the answers so far stays: the next one is likely
        to resemble them."""
        self._tokens += self._start

    def continuation(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next; empty if the last ones have not occurred
        together before."""
        self._index()
        long, short = LENGTHS
        found = self._repetition(long, count)
        if not found and self._answers is not None:
            found = self._answers.continuation(self._key, self._tokens, count)
        return found or self._repetition(short, count)

    def _repetition(self, length: int, count: int) -> list[int]:
        """What followed the last ``length`` tokens in this text."""
        tokens = self._tokens
        start = self._next.get(tuple(tokens[-length:]))
        if start is None:
            return []
        # Where the text so far ends, what followed the last time repeats itself.
        period = len(tokens) - start
        return [tokens[start + offset % period] for offset in range(count)]

    def _index(self) -> None:
        tokens = self._tokens
        for position in range(self._indexed, len(tokens)):
            for length in LENGTHS:
                if position >= length:
                    self._next[tuple(tokens[position - length : position])] = position
        self._indexed = len(tokens)
