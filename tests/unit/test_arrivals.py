"""The rate at which jobs come."""

import random
from statistics import fmean, stdev

from services.gateway.state.arrivals import Arrivals
from tests.support.clocks import Clock


def test_the_rate_is_that_of_the_jobs_that_came_lately() -> None:
    clock = Clock(1000.0)
    arrivals = Arrivals(clock)
    assert arrivals.per_s("m", ("high", "normal")) == 0
    for _ in range(500):
        clock.now += 2
        arrivals.note(("m", "high"))
        if clock.now % 4 == 0:
            arrivals.note(("m", "normal"))
        arrivals.note(("other", "high"))
    assert abs(arrivals.per_s("m", ("high",)) - 0.5) < 0.01
    assert abs(arrivals.per_s("m", ("high", "normal")) - 0.75) < 0.02
    clock.now += 3600
    assert arrivals.per_s("m", ("high", "normal")) < 0.05


def test_a_rate_is_known_after_some_seconds() -> None:
    dice, shares = random.Random(1), []
    for _ in range(200):
        clock = Clock(1000.0)
        arrivals = Arrivals(clock)
        while clock.now < 1025:
            clock.now += dice.expovariate(2.5)
            arrivals.note(("m", "normal"))
        shares.append(arrivals.per_s("m", ("normal",)) / 2.5)
    assert 0.85 < fmean(shares) < 1.05
    assert stdev(shares) < 0.25


def test_jobs_that_come_at_once_are_not_a_rate() -> None:
    """Neither then nor later, nor if it happens again from time to time."""
    clock = Clock(1000.0)
    arrivals = Arrivals(clock)
    for _ in range(3):
        clock.now += 1200
        for _ in range(200):
            clock.now += 0.01
            arrivals.note(("m", "high"))
            assert arrivals.per_s("m", ("high",)) < 0.2
        for _ in range(600):
            clock.now += 0.1
            assert arrivals.per_s("m", ("high",)) < 0.2
        assert arrivals.per_s("m", ("high",)) == 0


def test_a_script_that_submits_jobs_for_a_minute_has_a_rate_while_it_runs() -> None:
    clock = Clock(1000.0)
    arrivals = Arrivals(clock)
    for _ in range(2000):
        clock.now += 0.025
        arrivals.note(("m", "high"))
    assert 36 < arrivals.per_s("m", ("high",)) < 44
    clock.now += 120
    assert arrivals.per_s("m", ("high",)) == 0
