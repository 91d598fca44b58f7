"""How many jobs may wait for a model, and when a refused client should come back."""

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
    """A publish that had not ended when the state was read may be missing in it; one that had is
    counted by the broker. The same state, seen again, misses all that came since."""
    reservations = Reservations()
    before, after = ModelConsumers("m", {}), ModelConsumers("m", {})
    assert reservations.not_in(before) == 0
    reservations.reserved = 2
    reservations.ended = 1
    assert reservations.not_in(before) == 2
    assert reservations.not_in(after) == 1
    reservations.reserved = 3
    assert reservations.not_in(after) == 2
    reservations.ended = 3
    assert reservations.not_in(after) == 2
    assert reservations.not_in(ModelConsumers("m", {})) == 0
