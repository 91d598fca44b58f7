"""What the engine remembers of the times of its steps."""

from services.inferer.engine.step_times import ENOUGH, FORGET_S, RECENT, REFRESH_S, StepTimes
from tests.support.clocks import Clock


def test_the_median_of_recent_steps_counts() -> None:
    """For each number of sequences apart, and once there are enough."""
    times = StepTimes()
    for _ in range(ENOUGH - 1):
        times.observe(1, 0.1)
    times.observe(2, 0.3)
    assert times.seconds == {}
    times.observe(1, 60.0)  # the machine slept
    assert times.seconds == {1: 0.1}
    for _ in range(RECENT):
        times.observe(1, 0.2)
    assert times.seconds == {1: 0.2}


def test_a_slowdown_stays_within_what_an_entry_can_say() -> None:
    """If the machine swaps while two jobs share it: a larger one makes the entry unreadable."""
    times = StepTimes()
    for _ in range(ENOUGH):
        times.observe(1, 0.001)
        times.observe(2, 60.0)
    assert times.slowdown(2) == 1000.0


def test_old_measurements_are_forgotten() -> None:
    clock = Clock()
    times = StepTimes(clock)
    for _ in range(ENOUGH):
        times.observe(1, 0.1)
    clock.now = FORGET_S + 1
    assert times.seconds == {}
    for _ in range(ENOUGH - 1):
        times.observe(1, 0.5)
    assert times.seconds == {}
    times.observe(1, 0.5)
    assert times.seconds == {1: 0.5}


def test_a_measurement_is_due_when_there_were_few_steps_lately() -> None:
    """It counts until it is forgotten, all the same."""
    clock = Clock()
    times = StepTimes(clock)
    for _ in range(ENOUGH):
        assert times.is_due(1)
        times.observe(1, 0.1)
        clock.now += REFRESH_S / ENOUGH / 2
    assert not times.is_due(1)
    clock.now += REFRESH_S / 2 + 1
    assert times.is_due(1)
    assert times.seconds == {1: 0.1}
    times.observe(1, 0.5)
    assert not times.is_due(1)
    assert times.seconds == {1: 0.1}
