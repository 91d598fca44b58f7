"""Guesses from the text so far and from earlier answers, against a search through all of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.inferer.engine import lookup
from services.inferer.engine.lookup import LENGTHS, Answers, Lookup

TOKENS = some.lists(some.integers(0, 3), max_size=60)
"""Few different ones, so that most n-grams occur again."""
ALICE, BOB = ("alice", ""), ("bob", "")
FORM = [20, 21, 22, 23, 24, 25, 26, 27, 28]
"""Of answers: no n-gram occurs twice in it."""


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
    mine = Lookup(tokens)
    assert mine.continuation(n) == search(tokens, n)
    for token in answer:
        tokens.append(token)
        mine.add(token)
        assert mine.continuation(n) == search(tokens, n)


def test_a_copy_is_guessed_from_its_third_token_on() -> None:
    quotation = [5, 6, 7, 8, 9]
    tokens = [1, *quotation, 2, 3, 5, 6]
    mine = Lookup(tokens)
    assert mine.continuation(3) == [7, 8, 9]


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


def write(answers: Answers, prompt: list[int], answer: list[int], key: tuple[str, str]) -> Lookup:
    """An answer, token by token."""
    mine = Lookup(prompt, answers, key)
    for token in answer:
        mine.add(token)
    return mine


def test_an_answer_is_guessed_from_an_earlier_one() -> None:
    """From its first token on, if the prompts end alike; and after it has had a text of its own."""
    answers = Answers()
    write(answers, [1, 2, 11, 12, 13], FORM, ALICE)
    mine = Lookup([3, 4, 5, 11, 12, 13], answers, ALICE)
    for token in (20, 21, 99):
        mine.add(token)
        if token != 99:
            assert mine.continuation(3) == FORM[FORM.index(token) + 1 :][:3]
    for token in FORM[3:6]:
        mine.add(token)
        assert mine.continuation(3) == []
    mine.add(FORM[6])
    assert mine.continuation(3) == FORM[7:], "no more than followed"
    mine.add(FORM[7])
    mine.add(FORM[8])
    assert mine.continuation(3) == []


def test_answers_that_are_written_at_the_same_time_learn_from_each_other() -> None:
    answers = Answers()
    first, second = (Lookup([number, 11, 12, 13], answers, ALICE) for number in (1, 2))
    for number, token in enumerate(FORM):
        first.add(token)
        assert first.continuation(3) == []
        if number:
            assert second.continuation(3) == [token]
        second.add(token)


def test_prompts_are_not_guessed_from() -> None:
    """Nor what comes after the end of an answer: the next one to the same prompt."""
    answers = Answers()
    mine = write(answers, [*FORM, 11, 12, 13, 14], [30, 31], ALICE)
    mine.begin_next_answer()
    mine.add(32)
    assert Lookup(FORM[:5], answers, ALICE).continuation(3) == []
    assert Lookup([12, 13, 14, 30], answers, ALICE).continuation(3) == [31]
    for ends in ([14, 30, 31], [31, 11, 12, 13], [31, 12, 13, 14]):
        assert Lookup([0, *ends][-4:], answers, ALICE).continuation(3) == []


@pytest.mark.parametrize("other", [("", ""), BOB, ("alice", "adapter")])
def test_nothing_is_guessed_from_answers_with_another_key(other: tuple[str, str]) -> None:
    answers = Answers()
    write(answers, [11, 12, 13], FORM, ALICE)
    assert write(answers, [11, 12, 13], FORM[:5], other).continuation(3) == []
    assert write(answers, [11, 12, 13], FORM[:5], ALICE).continuation(3) == FORM[5:8]


def test_what_is_guessed_first() -> None:
    """After three tokens that occurred in the text itself, what followed there; otherwise what
    followed the last four in an earlier answer; then what followed two in the text itself."""
    answers = Answers()
    write(answers, [7], [1, 2, 3, 4, 50], ALICE)
    assert Lookup([2, 3, 4, 60, 1, 2, 3, 4], answers, ALICE).continuation(1) == [60]
    assert Lookup([3, 4, 70, 1, 2, 3, 4], answers, ALICE).continuation(1) == [50]
    assert Lookup([3, 4, 70, 9, 2, 3, 4], answers, ALICE).continuation(1) == [70]


def test_the_oldest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were not written again since, of any key."""
    monkeypatch.setattr(lookup, "CAPACITY", 10)
    answers = Answers()
    write(answers, [1, 2, 3, 4], [5, 6, 7, 8, 9], ALICE)
    write(answers, [1, 2, 3, 4], [5], ALICE)
    write(answers, [21, 22, 23, 24], [25, 26, 27, 28, 29, 30], BOB)
    assert len(answers) == 10
    assert Lookup([2, 3, 4, 5], answers, ALICE).continuation(3) == []
    assert Lookup([1, 2, 3, 4], answers, ALICE).continuation(3) == [5]
    assert Lookup([3, 4, 5, 6], answers, ALICE).continuation(3) == [7, 8, 9]


@given(
    some.lists(some.tuples(some.integers(0, 2), some.integers(0, 2)), max_size=60),
    some.integers(1, 30),
)
def test_answers_find_what_a_search_finds(steps: list[tuple[int, int]], capacity: int) -> None:
    """Three answers at the same time, two of them of one owner; after each token."""
    keys = (ALICE, ALICE, BOB)
    texts: list[list[int]] = [[0, 0, 0], [0], []]
    written: list[tuple[object, ...]] = []
    """Owners, n-grams and the token after each; the last of each n-gram only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "CAPACITY", capacity)
        answers = Answers()
        for number, token in steps:
            text = texts[number]
            text.append(token)
            answers.add(keys[number], text)
            new = (keys[number][0], *text[-5:])
            written = [old for old in written if old[:-1] != new[:-1]]
            written = [*written, new][-capacity:]
            assert len(answers) == len(written)
            for text, key in zip(texts, keys, strict=True):
                expected: list[int] = []
                for _ in range(3):
                    ngram = (key[0], *[*text, *expected][-4:])
                    found = [old[-1] for old in written if old[:-1] == ngram]
                    expected += [token for token in found if isinstance(token, int)]
                assert answers.continuation(key, text, 3) == expected
