"""How many jobs of a model may be in flight."""

from services.gateway.state.fleet import limit_of
from shared.wire.inferers import InfererEntry, RunningJob

AT = "2026-01-31T12:00:00.000000Z"


def inferer(slots: int, jobs: int = 0) -> InfererEntry:
    return InfererEntry(
        id="i",
        model="m",
        slots=slots,
        host="h",
        threads=1,
        n_ctx=512,
        tasks=["complete"],
        started_at=AT,
        version="1",
        jobs=[
            RunningJob(id=f"{n}", attempt=1, started_at=AT, completion_tokens=0, max_tokens=1)
            for n in range(jobs)
        ],
    )


def test_there_is_one_place_for_each_live_slot() -> None:
    assert limit_of([inferer(2), inferer(1)], in_flight=0) == 3
    assert limit_of([inferer(2, jobs=2)], in_flight=2) == 2


def test_there_is_always_a_place() -> None:
    """So that a job can be delivered to the first inferer that comes."""
    assert limit_of([], in_flight=0) == 1
    assert limit_of([inferer(0)], in_flight=0) == 1


def test_jobs_of_dead_inferers_take_no_place_of_the_living() -> None:
    """Of 5 in flight 2 are reported: 3 wait for their leases to expire."""
    assert limit_of([inferer(2, jobs=2)], in_flight=5) == 5
    assert limit_of([inferer(1)], in_flight=1) == 2
