"""Guesses from the text so far, against a search through all of it."""

from hypothesis import given
from hypothesis import strategies as some

from services.inferer.engine.lookup import LENGTHS, Lookup

TOKENS = some.lists(some.integers(0, 3), max_size=60)
"""Few different ones, so that most n-grams occur again."""


def search(tokens: list[int], count: int) -> list[int]:
    """What followed the longest suffix that occurred before, the last time, token by token."""
    for length in LENGTHS:
        suffix = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == suffix:
                copy = list(tokens)
                for offset in range(count):
                    copy.append(copy[end + offset])
                return copy[len(tokens) :]
    return []


@given(TOKENS, TOKENS, some.integers(0, 8))
def test_a_lookup_finds_what_a_search_finds(prompt: list[int], answer: list[int], n: int) -> None:
    """For the prompt, and after each token of the answer."""
    tokens = list(prompt)
    lookup = Lookup(tokens)
    assert lookup.continuation(n) == search(tokens, n)
    for token in answer:
        tokens.append(token)
        lookup.add([token])
        assert lookup.continuation(n) == search(tokens, n)


def test_a_copy_is_guessed_from_its_third_token_on() -> None:
    quotation = [5, 6, 7, 8, 9]
    tokens = [1, *quotation, 2, 3, 5, 6]
    lookup = Lookup(tokens)
    assert lookup.continuation(3) == [7, 8, 9]


def test_the_longest_match_decides_and_then_the_last_one() -> None:
    tokens = [4, 1, 2, 7, 3, 1, 2, 8, 3, 1, 2, 9, 4, 1, 2]
    assert Lookup(tokens).continuation(1) == [7]
    assert Lookup([*tokens[:-3], 5, 1, 2]).continuation(1) == [9]


def test_a_repetition_is_continued_beyond_the_end() -> None:
    assert Lookup([1, 2, 3, 1, 2, 3]).continuation(7) == [1, 2, 3, 1, 2, 3, 1]
    assert Lookup([0, 0, 0, 0]).continuation(3) == [0, 0, 0]


def test_nothing_is_guessed_in_a_new_text() -> None:
    assert Lookup([]).continuation(3) == []
    assert Lookup([1]).continuation(3) == []
    assert Lookup(list(range(100))).continuation(3) == []
