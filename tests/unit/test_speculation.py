"""How many drafts a batch checks, by measured times and earlier guesses alone."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.inferer.engine.sequence import Sequence
from services.inferer.engine.speculation import (
    FORGET_AFTER,
    LEAST_STEPS,
    LONGEST_STREAK,
    MAX_DRAFTS,
    MIN_GAIN,
    RECENT_GUESSES,
    Speculation,
    Streaks,
)


def guessing(streak: int, drafts: int = MAX_DRAFTS) -> Sequence:
    sequence = Sequence()
    sequence.streak = streak
    sequence.draft = list(range(drafts))
    return sequence


def experienced(right: float) -> Speculation:
    """One that has seen that such a part of the guesses are right, whatever the streak."""
    speculation = Speculation()
    for streak in range(LONGEST_STREAK + 1):
        for number in range(1000):
            speculation.streaks.learn(streak, int((number + 1) * right) > int(number * right))
    return speculation


def run(
    speculation: Speculation,
    sequences: list[Sequence],
    cost: Callable[[int], float],
    steps: int = 100,
) -> list[int]:
    """Steps that take ``cost`` of the drafts in them; the counts of the last one."""
    counts: list[int] = []
    for _ in range(steps):
        counts = speculation.counts(sequences, room=100)
        speculation.observe(len(sequences), sum(counts), cost(sum(counts)))
    return counts


def best(right: float, cost: Callable[[int], float]) -> int:
    """The number of drafts that gives most tokens per second, of one sequence."""

    def speed(count: int) -> float:
        return sum(right**number for number in range(count + 1)) / cost(count)

    found = max(range(MAX_DRAFTS + 1), key=speed)
    return found if speed(found) > MIN_GAIN * speed(0) else 0


@pytest.mark.parametrize("right", [0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("row", [0.01, 0.29, 0.65, 1.0])
def test_the_fastest_number_of_drafts_is_found(right: float, row: float) -> None:
    """``row``: how much longer a step takes for each draft, with a step without any as the unit."""

    def cost(count: int) -> float:
        return 0.008 * (1 + row * count)

    assert run(experienced(right), [guessing(0)], cost) == [best(right, cost)]


def test_steps_that_do_not_grow_evenly() -> None:
    """Some kernels compute four rows faster than two."""

    def cost(count: int) -> float:
        return (1.0, 1.8, 2.6, 1.3, 2.1, 2.9, 3.7, 2.6)[count]

    assert run(experienced(0.9), [guessing(0)], cost) == [best(0.9, cost)] == [3]


def test_where_drafts_do_not_pay_few_are_tried() -> None:
    speculation, sequence = experienced(0.5), guessing(0)
    tried = 0
    for _ in range(FORGET_AFTER - 1):
        (count,) = speculation.counts([sequence], room=100)
        tried += count
        speculation.observe(1, count, 1.0 + count)
    assert tried == LEAST_STEPS


def test_a_measurement_is_forgotten_after_a_while() -> None:
    """The machine was busy when drafts were tried; now they pay."""
    speculation, sequence = experienced(0.9), guessing(0)
    assert run(speculation, [sequence], lambda count: 1.0 + count) == [0]
    assert run(speculation, [sequence], lambda count: 1.0, FORGET_AFTER) == [MAX_DRAFTS]


def test_a_step_in_which_the_machine_slept_changes_nothing() -> None:
    speculation, sequence = experienced(0.9), guessing(0)
    before = run(speculation, [sequence], lambda count: 1.0 + 0.2 * count)
    speculation.observe(1, sum(before), 1000.0)
    speculation.observe(1, 0, 1000.0)
    assert run(speculation, [sequence], lambda count: 1.0 + 0.2 * count, 1) == before


def test_others_are_not_slowed_down() -> None:
    """On a CPU a draft takes about as long as a token of another sequence; on a GPU nothing."""
    sequences = [guessing(100), guessing(0, drafts=0)]
    assert run(Speculation(), sequences, lambda count: 1.0 + 0.2 * count) == [0, 0]
    assert run(Speculation(), sequences, lambda count: 1.0 + 0.01 * count) == [MAX_DRAFTS, 0]


def test_the_likeliest_drafts_are_checked() -> None:
    sequences = [guessing(0), guessing(20), guessing(20, drafts=2)]
    assert run(Speculation(), sequences, lambda count: 1.0) == [0, 5, 2]


@pytest.mark.parametrize("streak", [0, 1, 7, LONGEST_STREAK, LONGEST_STREAK + 1, 1000])
def test_how_often_guesses_are_right_is_learned(streak: int) -> None:
    """For each streak by itself; what was seen lately counts."""
    streaks = Streaks()
    assumed = streaks.chance(streak)
    counted = min(streak, LONGEST_STREAK)
    assert assumed == pytest.approx((counted + 1) / (counted + 2))
    for is_right, expected in ((False, 0.0), (True, 1.0)):
        for _ in range(5 * RECENT_GUESSES):
            streaks.learn(streak, is_right)
        assert streaks.chance(streak) == pytest.approx(expected, abs=0.1)
        assert streaks.chance(counted - 1 if counted else 1) != streaks.chance(streak)


def test_guesses_count_whether_they_were_checked_or_not() -> None:
    speculation, sequence = Speculation(), guessing(2)
    before = speculation.streaks.chance(2)
    sequence.guesses = [(2, False)]
    assert speculation.counts([sequence], room=0) == [0]
    assert speculation.streaks.chance(2) < before
    assert not sequence.guesses


@given(
    some.lists(some.builds(guessing, some.integers(0, 99), some.integers(0, 9)), max_size=6),
    some.integers(0, 9),
    some.integers(1, 100),
)
def test_counts_are_within_their_bounds(sequences: list[Sequence], room: int, steps: int) -> None:
    speculation = Speculation()
    run(speculation, sequences, lambda count: 1.0, steps)
    counts = speculation.counts(sequences, room)
    assert len(counts) == len(sequences)
    assert sum(counts) <= min(room, MAX_DRAFTS)
    for sequence, count in zip(sequences, counts, strict=True):
        assert 0 <= count <= len(sequence.draft)
