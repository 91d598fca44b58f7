"""The rate at which jobs come."""

from services.gateway.state.arrivals import LEAST_SPAN_S, Arrivals
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


def test_jobs_that_come_at_once_are_hardly_a_rate() -> None:
    arrivals = Arrivals(Clock(1000.0))
    for _ in range(7):
        arrivals.note(("m", "high"))
    assert arrivals.per_s("m", ("high",)) == 6 / LEAST_SPAN_S
