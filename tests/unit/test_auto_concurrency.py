"""How many jobs share a batch with ``INFERER_CONCURRENCY=auto``."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inferer.worker.auto_concurrency import NOISE, QUEUE, best_concurrency

MOST = 8


@pytest.mark.parametrize(
    ("step_s", "best"),
    [
        ({}, MOST),
        ({1: 0.010}, MOST),
        ({1: 0.010, 2: 0.0127, 4: 0.018, 8: 0.0296}, MOST),  # SmolLM2 on two cores
        ({1: 0.014, 2: 0.0235, 3: 0.0299, 4: 0.0359, 5: 0.0425, 8: 0.065}, 4),  # an EPYC
        ({1: 0.010, 2: 0.019}, 1),
        ({1: 0.010, 2: 0.014, 3: 0.030}, 2),
        ({1: 0.010, 8: 0.080}, 4),  # what lies between may pay
        ({1: 0.010, 4: 0.040, 8: 0.080}, 2),
        ({1: 0.010, 2: 0.020, 4: 0.040}, 1),
        ({9: 0.010}, MOST),  # from before the limit was lowered
    ],
)
def test_as_many_as_pay(step_s: dict[int, float], best: int) -> None:
    assert best_concurrency(step_s, MOST) == best


def test_the_jobs_of_a_queue_end_soonest_on_average() -> None:
    """In turn 16 jobs end after 1, 2, … 16; in pairs, two each after 1, 2, … 8 steps of two."""
    assert best_concurrency({1: 1.0, 2: 1.88}, 2) == 2
    assert best_concurrency({1: 1.0, 2: 1.90}, 2) == 1


@pytest.mark.parametrize(("current", "best"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 8)])
def test_of_numbers_that_are_nearly_as_good_no_larger_one_is_taken(current: int, best: int) -> None:
    """On some CPUs a step takes nearly as many times as long as it has sequences."""
    step_s = {1: 0.0068, 2: 0.0133, 3: 0.0190, 4: 0.0235, 8: 0.0380}
    assert best_concurrency(step_s, MOST, current) == best


@pytest.mark.parametrize(("two_s", "best"), [(0.016, 2), (0.023, 1)])
@pytest.mark.parametrize("current", [1, 2])
def test_a_number_that_is_clearly_better_is_taken(two_s: float, best: int, current: int) -> None:
    assert best_concurrency({1: 0.010, 2: two_s}, 2, current) == best


@pytest.mark.parametrize(
    ("step_s", "most", "per_batch", "best"),
    [
        ({}, MOST, 2, 3),
        ({1: 0.0057, 2: 0.0064}, MOST, 2, 3),
        ({1: 0.0057, 2: 0.0064}, 2, 2, 2),  # no memory for more
        ({1: 0.0057, 2: 0.0064, 3: 0.010}, MOST, 2, 3),
        ({1: 0.0057, 2: 0.0120}, MOST, 2, 1),
        ({1: 0.0057, 2: 0.0064, 4: 0.0072}, MOST, 4, 5),
        ({1: 0.0057, 2: 0.0064, 4: 0.0200}, MOST, 4, 3),
        ({1: 0.0057}, MOST, 1, 1),
        ({1: 0.010, 2: 0.030}, MOST, 2, 1),
        ({1: 0.0057, 8: 0.0064}, MOST, 8, 8),
    ],
)
@pytest.mark.parametrize("current", [1, 3, 8])
def test_one_more_than_a_batch_has_takes_turns(
    step_s: dict[int, float], most: int, per_batch: int, best: int, current: int
) -> None:
    assert best_concurrency(step_s, most, current, per_batch) == best


@given(st.lists(st.floats(0.0, 1.0), min_size=MOST, max_size=MOST))
def test_it_ends_at_a_number_that_is_not_worse_than_one(more_s: list[float]) -> None:
    """Whatever further sequences cost: what is chosen is measured, until nothing new is chosen."""
    true_s = {n: 1.0 + sum(more_s[1:n]) for n in range(1, MOST + 1)}
    measured, best = {1: true_s[1]}, 1
    for _ in range(2 * MOST):
        best = best_concurrency(measured, MOST, best)
        measured[best] = true_s[best]
    assert best == best_concurrency(measured, MOST, best)
    # Of one and of the neighbours that were measured, none is better by more than the noise.
    for other in (1, best - 1, best + 1):
        if other in measured:
            assert mean_end(true_s, best) <= mean_end(true_s, other) * (1 + NOISE) * (1 + 1e-9)


def mean_end(step_s: dict[int, float], at_once: int) -> float:
    ends = [step_s[at_once] * (1 + job // at_once) for job in range(QUEUE)]
    return mean(ends)
