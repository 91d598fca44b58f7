"""How many jobs may wait for a model, and when a refused client should come back."""

import time

import pytest

from services.gateway.jobs.admission import Reservations, jobs_to_end
from shared.broker.consumers import ModelConsumers


@pytest.mark.parametrize(
    ("waiting", "bound", "slots", "expected"),
    [
        (0, 1, 1, 0),
        (99, 100, 1, 0),
        (100, 100, 1, 10),
        (100, 100, 64, 10),
        (105, 100, 1, 15),
        (1000, 1000, 1, 10),
        (1000, 1000, 4, 40),
        (1000, 1000, 64, 100),
        (1, 1, 1, 1),
        (9, 9, 8, 1),
        (5, 0, 1, 6),
    ],
)
def test_a_job_is_refused_once_the_bound_is_reached(
    waiting: int, bound: int, slots: int, expected: int
) -> None:
    """Then as many must go as are over it, and a tenth of the bound or ten for each slot, whichever
    is less, but at least one."""
    assert jobs_to_end(waiting, bound, slots) == expected


def test_reservations_count_what_a_read_may_not_include() -> None:
    """A publish that had not ended when the broker was asked may be missing in its answer, however
    late that is used; one that had is counted by the broker."""

    def read() -> ModelConsumers:
        return ModelConsumers("m", {}, time.monotonic())

    reservations = Reservations()
    before = read()
    assert reservations.not_in(before) == 0
    with reservations.hold():
        assert reservations.not_in(before) == 1
        during = read()
        with reservations.hold():
            pass
        after_one = read()
        assert reservations.not_in(before) == reservations.not_in(during) == 2
        assert reservations.not_in(after_one) == 1
    assert reservations.not_in(during) == 2
    assert reservations.not_in(after_one) == 1
    assert reservations.not_in(read()) == 0
    assert reservations.not_in(before) == 2, "a later read changes nothing"
    reservations.forget_before(after_one)
    assert (reservations.not_in(after_one), reservations.not_in(read())) == (1, 0)
