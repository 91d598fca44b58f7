"""What gateways learn of jobs that run and have run."""

from datetime import UTC, datetime, timedelta

import numpy

from services.gateway.eta.pace import Pace
from services.gateway.eta.running import RunningJobs
from services.gateway.eta.simulation import Simulation, Slot
from shared.messages import Completed, InfererEntry, RunningJob, StateEvent, Timings, Usage, Work
from shared.timestamps import timestamp

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


def test_each_inferer_has_its_speed() -> None:
    """One that is not known yet is taken to be like the others."""
    pace = Pace()
    assert not pace.is_known
    for _ in range(20):
        pace.learn(result(1.1, inferer="fast"))
        pace.learn(result(4.1, inferer="slow"))
    assert pace.speed("slow").token_s > 3 * pace.speed("fast").token_s
    assert pace.speed("fast").token_s < pace.speed("new").token_s < pace.speed("slow").token_s


def test_a_job_goes_to_the_slot_that_is_free_first() -> None:
    """Two equal slots take four equal jobs in the time of two."""
    pace = Pace()
    for _ in range(20):
        pace.learn(result(1.1))
    simulation = Simulation(pace, [Slot("i"), Slot("i")])
    done = [float(numpy.median(simulation.serve(WORK))) for _ in range(4)]
    assert abs(done[0] - 1.1) < 0.1
    assert abs(done[3] - 2.2) < 0.2


def test_jobs_are_heard_and_seen() -> None:
    """What has just started is not in its inferer's entry yet; what has ended may still be."""
    jobs = RunningJobs()
    jobs.hear("new", started(ago(0.1)))
    seen = RunningJob(id="old", attempt=1, started_at=ago(9), completion_tokens=7, max_tokens=9)
    assert {run.job_id: run.tokens for run in jobs.of([entry(seen)]).values()} == {
        "new": 0,
        "old": 7,
    }
    jobs.end("old")
    assert set(jobs.of([entry(seen)])) == {"new"}
    jobs.hear("new", StateEvent(state="returned", attempt=1, at=ago(0), inferer="i"))
    assert jobs.of([entry(seen)]) == {}


def test_a_job_whose_end_was_missed_is_not_seen_for_ever() -> None:
    """It is in no entry although it would have been for long."""
    jobs = RunningJobs()
    jobs.hear("ghost", started(ago(60)))
    assert jobs.of([entry()]) == {}
    # One that runs again is the later attempt, whatever an entry says of the earlier one.
    jobs.hear("again", started(ago(1), attempt=2))
    seen = RunningJob(id="again", attempt=1, started_at=ago(30), completion_tokens=7, max_tokens=9)
    assert jobs.of([entry(seen)])["again"].tokens == 0
