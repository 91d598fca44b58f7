"""What gateways learn of jobs that run and have run."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy
import pytest

from services.gateway.eta.running_jobs import Run, RunningJobs
from services.gateway.eta.service_time import Pace
from services.gateway.eta.simulation import Simulation, Slot
from shared.timestamps import timestamp
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry, RunningJob
from shared.wire.requests import Work
from shared.wire.results import Completed, Timings, Usage

WORK = Work(prompt_bytes=40, max_tokens=100, chat=True)


def ago(seconds: float) -> str:
    return timestamp(datetime.now(UTC) - timedelta(seconds=seconds))


def result(
    took_s: float, *, inferer: str = "i", prompt_ms: float = 100, tokens: int = 50
) -> Completed:
    return Completed(
        id="x",
        model="m",
        attempt=1,
        queued_at=ago(10),
        started_at=ago(took_s),
        finished_at=ago(0),
        inferer=inferer,
        timings=Timings(queued_ms=0, prompt_ms=100, generation_ms=1000 * took_s - 100),
        text="",
        finish_reason="stop",
        usage=Usage(10, 50, 60),
        chat=True,
        work=WORK,
    )


def entry(*jobs: RunningJob) -> InfererEntry:
    return InfererEntry(
        id="i",
        model="m",
        slots=1,
        host="h",
        threads=1,
        n_ctx=4096,
        chat=True,
        started_at=ago(100),
        version="1",
        jobs=list(jobs),
    )


def running(jobs: RunningJobs, *entries: InfererEntry) -> dict[str, Run]:
    return jobs.of(entries, datetime.now(UTC))


def started(at: str, attempt: int = 1) -> StateEvent:
    return StateEvent(state="started", attempt=attempt, at=at, inferer="i", work=WORK)


def test_a_clock_that_is_set_teaches_nothing() -> None:
    """A result that ended before it began, or took less than its prompt did."""
    pace = Pace()
    pace.learn(result(2.0))
    before = pace.speed("i")
    for took_s in (-5.0, 0.0, 0.05):
        pace.learn(result(took_s))
    assert pace.speed("i") == before


def p50_s(pace: Pace) -> float:
    """When a job would be done that an idle inferer begins now."""
    done = Simulation(pace, [Slot("i")], datetime.now(UTC)).serve(WORK)
    assert numpy.isfinite(done).all()
    return float(numpy.median(done))


def test_a_machine_that_slept_is_believed_by_nobody() -> None:
    """A job that was measured to take 8 hours, at whatever place in the history, leaves the
    estimate what it was; so do results whose durations cannot be."""
    usual = [result(2.0) for _ in range(4)]
    pace = Pace()
    for one in usual:
        pace.learn(one)
    expected_s = p50_s(pace)
    for place in range(1, 5):
        pace = Pace()
        for one in (*usual[:place], result(8 * 3600.0), *usual[place:]):
            pace.learn(one)
            assert p50_s(pace) < 2 * expected_s
        assert abs(p50_s(pace) - expected_s) < 0.2 * expected_s


def test_only_durations_are_learned_from() -> None:
    """Of two clock readings one may have been taken 462 years later, or before the other."""
    pace = Pace()
    pace.learn(result(2.0))
    expected_s = p50_s(pace)
    for finished_at in ("2488-01-01T00:00:00.000000Z", "0001-01-01T00:00:00.000000Z"):
        pace.learn(msgspec.structs.replace(result(2.0), finished_at=finished_at))
        assert abs(p50_s(pace) - expected_s) < 0.2 * expected_s


@pytest.mark.parametrize(
    "impossible",
    [
        {"timings": Timings(queued_ms=0, prompt_ms=100, total_ms=1e300)},
        {"timings": Timings(queued_ms=0, prompt_ms=100, total_ms=462 * 365 * 86_400_000.0)},
        {"timings": Timings(queued_ms=0, prompt_ms=-1e9, generation_ms=2000)},
        {"timings": Timings(queued_ms=0, prompt_ms=1e9, total_ms=100)},
        {"usage": Usage(10, 10**300, 60)},
        {"usage": Usage(10**400, 50, 60)},
        {"usage": Usage(-5, -5, -10)},
        {"work": Work(prompt_bytes=10**400, max_tokens=100, chat=True)},
        {"work": Work(prompt_bytes=40, max_tokens=0, chat=True)},
        {"work": Work(prompt_bytes=-1, max_tokens=10**30, chat=True)},
    ],
)
def test_what_cannot_be_teaches_nothing(impossible: dict[str, Any]) -> None:
    """Neither an exception nor another estimate; also as the first result of all."""
    pace = Pace()
    pace.learn(msgspec.structs.replace(result(2.0), **impossible))
    assert not pace.is_known
    pace.learn(result(2.0))
    expected_s = p50_s(pace)
    pace.learn(msgspec.structs.replace(result(2.0), **impossible))
    assert p50_s(pace) == expected_s


def test_an_inferer_that_has_become_slower_is_learned() -> None:
    """Robust is not stubborn: five jobs of the new speed are enough."""
    pace = Pace()
    for _ in range(20):
        pace.learn(result(1.1))
    for _ in range(5):
        pace.learn(result(10.1))
    assert pace.speed("i").token_s == 10 / 50


def test_a_run_that_began_in_the_future_has_just_begun() -> None:
    """And one of the year 1 has not run for two thousand years."""
    now = datetime.now(UTC)
    for started_at, elapsed_s in ((ago(-3600), 0), ("0001-01-01T00:00:00.000000Z", 86_400)):
        assert Run("x", "i", started_at, WORK).elapsed_s(now) == elapsed_s


def test_each_inferer_has_its_speed() -> None:
    """One that is not known yet is taken to be like the others."""
    pace = Pace()
    assert not pace.is_known
    for _ in range(20):
        pace.learn(result(1.1, inferer="fast"))
        pace.learn(result(4.1, inferer="slow"))
    assert pace.speed("slow").token_s > 3 * pace.speed("fast").token_s
    assert pace.speed("fast").token_s <= pace.speed("new").token_s <= pace.speed("slow").token_s


def test_a_job_goes_to_the_slot_that_is_free_first() -> None:
    """Two equal slots take four equal jobs in the time of two."""
    pace = Pace()
    for _ in range(20):
        pace.learn(result(1.1))
    simulation = Simulation(pace, [Slot("i"), Slot("i")], datetime.now(UTC))
    done = [float(numpy.median(simulation.serve(WORK))) for _ in range(4)]
    assert abs(done[0] - 1.1) < 0.1
    assert abs(done[3] - 2.2) < 0.2


def test_jobs_are_heard_and_seen() -> None:
    """What has just started is not in its inferer's entry yet; what has ended may still be."""
    jobs = RunningJobs()
    jobs.hear("new", started(ago(0.1)))
    seen = RunningJob(id="old", attempt=1, started_at=ago(9), completion_tokens=7, max_tokens=9)
    assert {run.job_id: run.tokens for run in running(jobs, entry(seen)).values()} == {
        "new": 0,
        "old": 7,
    }
    jobs.end("old")
    assert set(running(jobs, entry(seen))) == {"new"}
    jobs.hear("new", StateEvent(state="returned", attempt=1, at=ago(0), inferer="i"))
    assert running(jobs, entry(seen)) == {}


def test_a_job_whose_end_was_missed_is_not_seen_for_ever() -> None:
    """It is in no entry although it would have been for long."""
    jobs = RunningJobs()
    jobs.hear("ghost", started(ago(60)))
    assert running(jobs, entry()) == {}
    # One that runs again is the later attempt, whatever an entry says of the earlier one.
    jobs.hear("again", started(ago(1), attempt=2))
    seen = RunningJob(id="again", attempt=1, started_at=ago(30), completion_tokens=7, max_tokens=9)
    assert running(jobs, entry(seen))["again"].tokens == 0
