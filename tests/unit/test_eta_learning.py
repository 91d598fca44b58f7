"""What gateways observe of jobs that run and have run."""

import asyncio
import math
import random
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy
import pytest

from services.gateway.eta.lengths import Floats
from services.gateway.eta.running_jobs import RunningAttempt, RunningJobs
from services.gateway.eta.service_time import PROMPT_SAMPLES, ServiceTime
from services.gateway.eta.simulation import Batching, Simulation, Slot, Waiting, in_turns
from shared.broker.inferers import Live
from shared.timestamps import timestamp
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry, RunningJob
from shared.wire.requests import Work
from shared.wire.results import Choice, Completed, PromptTokensDetails, Timings, Usage
from tests.support.inferer_entries import inferer_entry

WORK = Work(prompt_bytes=40, max_tokens=100, task="chat")


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
        usage=Usage(10, tokens, 10 + tokens),
        task="chat",
        work=WORK,
    )


def done_s(simulation: Simulation, job: int, behind: int = 0) -> Floats:
    """Seconds until a job that has begun is done, in each draw."""
    found: Floats = asyncio.run(in_turns(simulation.follow([job], behind)))[0]
    return found


def entry(*jobs: RunningJob, **reported: Any) -> InfererEntry:
    return inferer_entry(started_at=ago(100), jobs=list(jobs), **reported)


def running(jobs: RunningJobs, *entries: InfererEntry) -> dict[str, RunningAttempt]:
    return jobs.running_on([Live(one, ago(0)) for one in entries], datetime.now(UTC))


def started(at: str, attempt: int = 1) -> StateEvent:
    return StateEvent(state="started", attempt=attempt, at=at, inferer="i", work=WORK)


def test_durations_over_a_clock_change_are_ignored() -> None:
    """A result that ended before it began, or took less than its prompt did."""
    service_time = ServiceTime()
    service_time.observe(result(2.0))
    before = service_time.speed("i")
    for took_s in (-5.0, 0.0, 0.05):
        service_time.observe(result(took_s))
    assert service_time.speed("i") == before


def test_before_the_first_result_the_reported_speeds_count() -> None:
    """Of 100 tokens a second the longest answers take a second; results count more; a speed that
    cannot be true counts nothing."""
    service_time = ServiceTime()
    impossible = entry(prompt_tokens_per_s=1e-300, tokens_per_s=1e-300)
    for entries in ([entry()], [entry(prompt_tokens_per_s=0.0, tokens_per_s=9.0)], [impossible]):
        service_time.report(entries)
        assert not service_time.is_known
    service_time.report([entry(prompt_tokens_per_s=1000.0, tokens_per_s=100.0)])
    simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
    done = done_s(simulation, simulation.serve(WORK))
    assert 0.3 < numpy.median(done) <= 1.1
    assert 0.9 < done.max() < 1.3
    simulation.serve_typical(10)
    for _ in range(3):
        service_time.observe(result(10.1))
    assert service_time.speed("i").token_s == 10 / 50


def p50_s(service_time: ServiceTime) -> float:
    """When a job would be done that an idle inferer begins now."""
    simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
    done = done_s(simulation, simulation.serve(WORK))
    assert numpy.isfinite(done).all()
    return float(numpy.median(done))


def test_durations_over_a_sleep_of_the_machine_are_ignored() -> None:
    """A job that was measured to take 8 hours, at whatever place in the history, leaves the
    estimate what it was; so do results whose durations cannot be."""
    usual = [result(2.0) for _ in range(4)]
    service_time = ServiceTime()
    for one in usual:
        service_time.observe(one)
    expected_s = p50_s(service_time)
    for place in range(1, 5):
        service_time = ServiceTime()
        for one in (*usual[:place], result(8 * 3600.0), *usual[place:]):
            service_time.observe(one)
            assert p50_s(service_time) < 2 * expected_s
        assert abs(p50_s(service_time) - expected_s) < 0.2 * expected_s


def test_the_estimate_depends_on_durations_only() -> None:
    """Of two clock readings one may have been taken 462 years later, or before the other."""
    service_time = ServiceTime()
    service_time.observe(result(2.0))
    expected_s = p50_s(service_time)
    for finished_at in ("2488-01-01T00:00:00.000000Z", "0001-01-01T00:00:00.000000Z"):
        service_time.observe(msgspec.structs.replace(result(2.0), finished_at=finished_at))
        assert abs(p50_s(service_time) - expected_s) < 0.2 * expected_s


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
        {"work": Work(prompt_bytes=10**400, max_tokens=100, task="chat")},
        {"work": Work(prompt_bytes=40, max_tokens=0, task="chat")},
        {"work": Work(prompt_bytes=-1, max_tokens=10**30, task="chat")},
    ],
)
def test_impossible_durations_are_ignored(impossible: dict[str, Any]) -> None:
    """Neither an exception nor another estimate; also as the first result of all."""
    service_time = ServiceTime()
    service_time.observe(msgspec.structs.replace(result(2.0), **impossible))
    assert not service_time.is_known
    service_time.observe(result(2.0))
    expected_s = p50_s(service_time)
    service_time.observe(msgspec.structs.replace(result(2.0), **impossible))
    assert p50_s(service_time) == expected_s


def test_a_speed_that_cannot_be_is_bounded() -> None:
    """Results by hand that name a live inferer: the estimate for its running job stays a number."""
    service_time, now = ServiceTime(), datetime.now(UTC)
    timings = Timings(queued_ms=0, prompt_ms=0, total_ms=1e-305)
    for _ in range(3):
        service_time.observe(
            msgspec.structs.replace(result(2.0), timings=timings, usage=Usage(10, 10**6, 10))
        )
    attempt = RunningAttempt("x", 1, "i", timestamp(now - timedelta(seconds=60)), WORK)
    simulation = Simulation(service_time, [Slot("i", attempt)], now, {})
    assert numpy.isfinite(done_s(simulation, 0)).all()


def test_an_inferer_that_has_become_slower_is_learned() -> None:
    """Robust is not stubborn: five jobs of the new speed are enough."""
    service_time = ServiceTime()
    for _ in range(20):
        service_time.observe(result(1.1))
    for _ in range(5):
        service_time.observe(result(10.1))
    assert service_time.speed("i").token_s == 10 / 50


def test_a_run_that_began_in_the_future_has_just_begun() -> None:
    """And one of the year 1 has not run for two thousand years."""
    now = datetime.now(UTC)
    for started_at, elapsed_s in ((ago(-3600), 0), ("0001-01-01T00:00:00.000000Z", 86_400)):
        assert RunningAttempt("x", 1, "i", started_at, WORK).elapsed_s(now) == elapsed_s


def test_each_inferer_has_its_speed() -> None:
    """One that is not known yet is taken to be like the others."""
    service_time = ServiceTime()
    assert not service_time.is_known
    for _ in range(20):
        service_time.observe(result(1.1, inferer="fast"))
        service_time.observe(result(4.1, inferer="slow"))
    assert service_time.speed("slow").token_s > 3 * service_time.speed("fast").token_s
    assert (
        service_time.speed("fast").token_s
        <= service_time.speed("new").token_s
        <= service_time.speed("slow").token_s
    )


def test_a_job_goes_to_the_slot_that_is_free_first() -> None:
    """Two equal inferers take four equal jobs in the time of two."""
    service_time = ServiceTime()
    for _ in range(20):
        service_time.observe(result(1.1))
    for jobs, took_s in ((1, 1.1), (4, 2.2)):
        simulation = Simulation(service_time, [Slot("i"), Slot("k")], datetime.now(UTC), {})
        for _ in range(jobs):
            last = simulation.serve(WORK)
        assert abs(numpy.median(done_s(simulation, last)) - took_s) < 0.1 * took_s


@pytest.mark.parametrize("n", [2, 4, 8])
def test_several_answers_take_several_times_as_long(n: int) -> None:
    """As the first of their kind, and once others have been seen. The prompt counts once."""
    service_time = learned()
    work = msgspec.structs.replace(WORK, n=n)
    took_s = 0.1 + n * 1.0

    def takes_s(attempt: RunningAttempt | None = None) -> float:
        simulation = Simulation(service_time, [Slot("i", attempt)], datetime.now(UTC), {})
        return float(numpy.median(done_s(simulation, 0 if attempt else simulation.serve(work))))

    for _ in range(2):
        assert abs(takes_s() - took_s) < 0.1 * took_s
        half = RunningAttempt("x", 1, "i", ago(took_s / 2), work, 50 * n // 2, ago(0))
        assert abs(takes_s(half) - took_s / 2) < 0.2 * took_s
        late = RunningAttempt("x", 1, "i", ago(2 * took_s), work, 100 * n - 1, ago(0))
        assert takes_s(late) < 3.0
        other = Choice(text="", finish_reason="stop", completion_tokens=50)
        one = msgspec.structs.replace(
            result(took_s, tokens=50 * n), work=work, other_choices=[other] * (n - 1)
        )
        for _ in range(30):
            service_time.observe(one)
    assert service_time.typical_work().n == n


SHARED = {"i": Batching([1.0, 1.5])}
"""An inferer that takes 1.5 times as long for a token of each of two jobs."""


def learned(*, delay_ms: float = 0.0) -> ServiceTime:
    """From jobs with 0.1 s for their prompt and 1 s for their answer, when alone; ``delay_ms`` is
    how much longer each took because of others."""
    service_time = ServiceTime()
    for _ in range(20):
        one = result(1.1 + delay_ms / 1000)
        assert one.timings is not None
        timings = msgspec.structs.replace(
            one.timings, prompt_delay_ms=0.0, generation_delay_ms=delay_ms
        )
        service_time.observe(msgspec.structs.replace(one, timings=timings))
    return service_time


def shared_s(jobs: int, behind: int = 0, *, slots: int = 2, delay_ms: float = 0.0) -> float:
    """When the last of ``jobs`` is done that wait for an inferer with ``slots``."""
    service_time = learned(delay_ms=delay_ms)
    simulation = Simulation(service_time, [Slot("i")] * slots, datetime.now(UTC), SHARED)
    for _ in range(jobs):
        last = simulation.serve(WORK)
    return float(numpy.median(done_s(simulation, last, behind)))


@pytest.mark.parametrize("delay_ms", [0.0, 700.0])
def test_jobs_on_one_inferer_share_its_time(delay_ms: float) -> None:
    """Alone 0.1 and 1 s; two at once take 2 x 0.1 and 1.5 x 1 s. However the jobs ran that this
    was learned from."""
    assert abs(shared_s(1, delay_ms=delay_ms) - 1.1) < 0.1
    assert abs(shared_s(2, delay_ms=delay_ms) - 1.7) < 0.15
    # The third begins when the first ends, and is alone as soon as the second ends, too.
    assert abs(shared_s(3, delay_ms=delay_ms) - 2.8) < 0.25
    # Those that wait behind it take the other slot.
    assert abs(shared_s(3, behind=9, delay_ms=delay_ms) - 3.4) < 0.3


def test_a_job_that_has_run_alone_is_slowed_down_by_the_next() -> None:
    """After 0.6 s of 1.1 a second one comes: half a second more takes 0.75, after its prompt."""
    service_time, now = learned(), datetime.now(UTC)
    attempt = RunningAttempt("x", 1, "i", ago(0.6), WORK, 25, timestamp(now))
    for jobs, left_s in ((0, 0.5), (1, 0.85)):
        simulation = Simulation(service_time, [Slot("i", attempt), Slot("i")], now, SHARED)
        for _ in range(jobs):
            simulation.serve(WORK)
        assert abs(numpy.median(done_s(simulation, 0)) - left_s) < 0.15


def test_jobs_that_will_come_share_the_inferer() -> None:
    """Where a job has a slot for itself, nothing changes. Otherwise it ends later, and how much is
    uncertain."""
    service_time, now = learned(), datetime.now(UTC)
    for slots, most_s in ((1, 1.1), (2, 1.7)):
        expected_s = []
        for per_s in (0.0, 0.5, 50.0):
            simulation = Simulation(service_time, [Slot("i")] * slots, now, SHARED, per_s)
            done = done_s(simulation, simulation.serve(WORK))
            expected_s.append(float(done.mean()))
        alone_s, shared_s, full_s = expected_s
        assert abs(alone_s - 1.1) < 0.1
        assert abs(full_s - most_s) < 0.15
        assert shared_s == alone_s if slots == 1 else alone_s < shared_s < full_s


def test_jobs_that_came_while_a_job_waited_share_its_inferer() -> None:
    """It begins after 17 s, with a job every 5 s: there is nearly always another by then."""
    means_s = []
    for per_s, behind in ((0.0, 0), (0.2, 0), (0.0, 50)):
        simulation = Simulation(learned(), [Slot("i"), Slot("i")], datetime.now(UTC), SHARED, per_s)
        for _ in range(20):
            simulation.serve(WORK)
        means_s.append(float(done_s(simulation, simulation.serve(WORK), behind).mean()))
    alone_s, shared_s, full_s = means_s
    assert shared_s > (alone_s + full_s) / 2


def test_unknown_jobs_share_an_inferer() -> None:
    """Two at a time take 0.2 s for their prompts and 1.5 s for their answers."""
    simulation = Simulation(learned(), [Slot("i"), Slot("i")], datetime.now(UTC), SHARED)
    simulation.serve_typical(100)
    assert abs(numpy.median(simulation.next_free_s) - 85) < 5


def test_answers_go_on_after_a_heartbeat() -> None:
    """25 of 50 tokens at the last one, 0.2 s ago, at 50 per second: 15 are left."""
    now = datetime.now(UTC)
    attempt = RunningAttempt(
        "x", 1, "i", ago(0.8), WORK, 25, timestamp(now - timedelta(seconds=0.2))
    )
    simulation = Simulation(learned(), [Slot("i", attempt)], now, {})
    assert abs(numpy.median(done_s(simulation, 0)) - 0.3) < 0.05


def test_the_prompt_of_a_job_that_runs_has_as_much_left_as_its_inferer_says() -> None:
    """It has run for a minute, because of others. At its heartbeat, 0.02 s ago, five of ten tokens
    were left, at 0.01 s each; then come 50 at 50 per second."""
    now = datetime.now(UTC)
    heartbeat = timestamp(now - timedelta(seconds=0.02))
    for left, left_s in ((5, 1.03), (0, 0.98)):
        attempt = RunningAttempt("x", 1, "i", ago(60), WORK, 0, heartbeat, left)
        simulation = Simulation(learned(), [Slot("i", attempt)], now, {})
        assert abs(numpy.median(done_s(simulation, 0)) - left_s) < 0.04


def test_prompts_share_the_time_since_a_heartbeat() -> None:
    """It was 0.2 s ago, when two prompts had 0.2 s left each, and an answer half of its second. One
    prompt has been computed since; the other and the answer have waited."""
    now = datetime.now(UTC)
    heartbeat = timestamp(now - timedelta(seconds=0.2))
    slots = [
        Slot("i", RunningAttempt("answer", 1, "i", ago(9), WORK, 25, heartbeat, 0)),
        Slot("i", RunningAttempt("first", 1, "i", ago(8), WORK, 0, heartbeat, 20)),
        Slot("i", RunningAttempt("second", 1, "i", ago(7), WORK, 0, heartbeat, 20)),
    ]
    simulation = Simulation(learned(), slots, now, {"i": Batching([1.0] * 3)})
    assert abs(numpy.median(done_s(simulation, 0)) - 0.7) < 0.05
    assert abs(numpy.median(done_s(simulation, 2)) - 1.2) < 0.05


def test_the_oldest_is_in_each_batch_and_the_others_take_turns() -> None:
    """Each had 25 of 50 tokens at its heartbeat, 0.22 s ago, alone at 50 per second. Two in a batch
    take 1.1 times as long: the oldest has 10 more since, and the others 5. So 15 are left of it,
    then 12 or 13 of the others, which have a place in each batch from then on."""
    now = datetime.now(UTC)
    heartbeat = timestamp(now - timedelta(seconds=0.22))
    slots = [
        Slot("i", RunningAttempt(name, 1, "i", ago(age_s), WORK, 25, heartbeat))
        for name, age_s in (("youngest", 0.8), ("oldest", 1.2), ("middle", 1.0))
    ]
    batching = {"i": Batching([1.0, 1.1, 1.65], 2)}
    ends_s = [
        float(numpy.median(done_s(Simulation(learned(), slots, now, batching), job)))
        for job in range(3)
    ]
    assert ends_s == pytest.approx([0.605, 0.33, 0.605], abs=0.04)


def test_prompts_of_later_jobs_have_held_up_an_answer() -> None:
    """Its prompt took 0.1 of 0.9 s, theirs 0.3: it has 25 of 50 tokens, at 50 per second."""
    now = datetime.now(UTC)
    started = [timestamp(now - timedelta(seconds=seconds)) for seconds in (0.9, 0.6, 0.5, 0.4)]
    slots = [Slot("i", RunningAttempt(at, 1, "i", at, WORK)) for at in started]
    simulation = Simulation(learned(), slots, now, {"i": Batching([1.0] * 4)})
    assert abs(numpy.median(done_s(simulation, 0)) - 0.5) < 0.05


def test_only_the_latest_prompts_say_how_much_is_cached() -> None:
    service_time = ServiceTime()
    for cached, jobs in ((0, 100), (9, PROMPT_SAMPLES)):
        usage = Usage(10, 50, 60, PromptTokensDetails(cached))
        for _ in range(jobs):
            service_time.observe(msgspec.structs.replace(result(1.1), usage=usage))
    assert service_time.prompt_tokens(WORK.prompt_bytes) == pytest.approx(1)


def cached(prompt_s: float, answer_s: float, *, computed: int = 10, tokens: int = 50) -> Completed:
    """A prompt of 200 tokens, of which ``computed`` were not cached."""
    timings = Timings(queued_ms=0, prompt_ms=1000 * prompt_s, generation_ms=1000 * answer_s)
    usage = Usage(200, tokens, 200 + tokens, PromptTokensDetails(200 - computed))
    return msgspec.structs.replace(result(1.1), timings=timings, usage=usage)


def test_a_speed_that_cannot_be_is_forgotten_although_all_other_prompts_are_cached() -> None:
    """The machine was suspended for an hour during the only prompt that was computed whole."""
    service_time = ServiceTime()
    service_time.observe(cached(3600.0, 1.0, computed=200))
    for _ in range(3):
        service_time.observe(cached(0.05, 1.0))
    assert service_time.speed("i").prompt_s <= 0.005


def test_an_inferer_that_has_become_slower_is_learned_although_most_prompts_are_cached() -> None:
    """Those that are computed whole take 5 instead of 1 ms per token."""
    service_time = ServiceTime()
    for token_s in (0.001, 0.005):
        for _ in range(5):
            service_time.observe(cached(200 * token_s, 1.0, computed=200))
            for _ in range(9):
                service_time.observe(cached(0.04 + 10 * token_s, 1.0))
        assert service_time.speed("i").prompt_s == pytest.approx(token_s)


def test_a_cached_prompt_takes_time() -> None:
    """40 ms, however short the answer is. Before it is known how long, the prompt's tokens are all
    that counts."""
    service_time = ServiceTime()
    for _ in range(5):
        service_time.observe(cached(0.2, 1.0, computed=200))
    assert service_time.speed("i").job_s(10, 2) == pytest.approx(0.05)
    for tokens in (2, 100, 50, 100, 2, 50, 2, 100, 50):
        service_time.observe(cached(0.05, 0.02 * tokens, tokens=tokens))
    for tokens in (2, 50, 100):
        assert service_time.speed("i").job_s(10, tokens) == pytest.approx(0.05 + 0.02 * tokens)


def share_covered(own: float, common: float, *, most: int = 8, rounds: int = 400) -> float:
    """How many jobs p90 covers: the last of 1 to ``most`` that wait for an idle inferer. Durations
    vary by these standard deviations: each by itself, and those of one job after another
    together."""
    dice, service_time, slow, covered = random.Random(1), ServiceTime(), 0.0, []
    for _ in range(rounds):
        jobs, took_ms = [], 0.0
        for _ in range(dice.randint(1, most)):
            slow = 0.8 * slow + 0.6 * dice.gauss(0, common)
            tokens, factor = dice.randint(40, 60), math.exp(slow + dice.gauss(0, own))
            timings = Timings(
                queued_ms=0, prompt_ms=100 * factor, generation_ms=20 * tokens * factor
            )
            jobs.append(msgspec.structs.replace(result(1.1, tokens=tokens), timings=timings))
            took_ms += timings.prompt_ms + timings.generation_ms
        if service_time.is_known:
            simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
            line = [Waiting(WORK, {})] * len(jobs)
            (done,) = asyncio.run(in_turns(simulation.run(line, [len(jobs) - 1], 0)))
            covered.append(took_ms / 1000 <= numpy.quantile(done, 0.9))
        for one in jobs:
            service_time.observe(one)
    return float(numpy.mean(covered))


@pytest.mark.parametrize(("own", "common"), [(0.05, 0.05), (0.03, 0.1), (0.02, 0.15), (0.1, 0.1)])
def test_p90_covers_jobs_that_are_slow_together(own: float, common: float) -> None:
    assert 0.88 <= share_covered(own, common) <= 0.95


def test_the_duration_of_unknown_jobs_is_uncertain() -> None:
    """Half of them have 10 tokens, half 90: 0.3 and 1.9 s. A few may all be long, many are not."""
    service_time = ServiceTime()
    for tokens in (10, 90) * 20:
        service_time.observe(result(0.1 + tokens / 50, tokens=tokens))
    for count, spread in ((1, 0.73), (100, 0.073)):
        simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
        simulation.serve_typical(count)
        waited_s = simulation.next_free_s
        assert abs(waited_s.mean() - 1.1 * count) < 0.2 * count
        assert abs(waited_s.std() / waited_s.mean() - spread) < 0.25 * spread


def test_jobs_of_higher_priority_that_will_come_are_expected() -> None:
    """One that waits for 11 s, while jobs of 1.1 s come every 2.2 s, begins after 22; if they come
    every second, much later, but not never. One that begins at once is not overtaken."""
    expected = {0.0: (12.1, 0.1), 1 / 2.2: (23.1, 2.0), 1.0: (140.0, 50.0)}
    for per_s, (mean_s, tolerance_s) in expected.items():
        simulation = Simulation(learned(), [Slot("i")], datetime.now(UTC), {})
        simulation.serve_arrivals({"high": per_s})
        for _ in range(10):
            simulation.serve(WORK)
        simulation.serve_arrivals({"high": per_s})
        done = done_s(simulation, simulation.serve(WORK))
        assert abs(numpy.median(done) - mean_s) < tolerance_s, per_s
        assert numpy.quantile(done, 0.9) > numpy.median(done) * (1.1 if per_s else 1.0)


def test_more_jobs_of_higher_priority_than_can_ever_be_served() -> None:
    """The job behind them will not be done in its lifetime."""
    service_time = ServiceTime()
    service_time.observe(result(300.0))
    simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
    simulation.serve(WORK)
    (done,) = asyncio.run(in_turns(simulation.run([Waiting(WORK, {"high": 1.0})], [0], 0)))
    assert numpy.isfinite(done).all()
    assert numpy.median(done) > 24 * 3600


def test_jobs_that_took_no_time_are_estimated() -> None:
    """A result may say so of its prompt, and may have no answer."""
    service_time = ServiceTime()
    nothing = msgspec.structs.replace(
        result(0.1), usage=Usage(10, 0, 10), timings=Timings(queued_ms=0, total_ms=0.001)
    )
    service_time.observe(nothing)
    simulation = Simulation(service_time, [Slot("i")], datetime.now(UTC), {})
    simulation.serve_typical(10)
    assert abs(simulation.next_free_s.max()) < 0.001


def test_a_job_that_computes_embeddings_ends_with_its_inputs() -> None:
    """The one that runs does not wait for those that began later, as an answer would."""
    work, now = Work(prompt_bytes=40, max_tokens=1, task="embed"), datetime.now(UTC)
    service_time = ServiceTime()
    embedded = msgspec.structs.replace(
        result(1.1), usage=Usage(10, 0, 10), task="embed", work=work,
        timings=Timings(queued_ms=0, prompt_ms=1000, total_ms=1100),
    )  # fmt: skip
    for _ in range(30):
        service_time.observe(embedded)
    attempt = RunningAttempt("x", 1, "i", timestamp(now - timedelta(seconds=0.6)), work)
    simulation = Simulation(service_time, [Slot("i", attempt), Slot("i")], now, SHARED)
    simulation.serve(work)
    assert abs(numpy.median(done_s(simulation, 0)) - 0.4) < 0.1


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("behind", [0, 30])
def test_one_run_finds_the_same_for_all_jobs_as_a_run_for_each(slots: int, behind: int) -> None:
    """A list shows what `/status` shows."""
    high = [Waiting(WORK, {}) for _ in range(4)]
    sizes: tuple[int | None, ...] = (10, 100, None, 100, 1000, 10, 100)
    normal = [Waiting(Work(40, size, "chat") if size else None, {"high": 0.05}) for size in sizes]
    low = [Waiting(WORK, {"high": 0.05, "normal": 0.1}) for _ in range(3)]
    line, service_time, now = high + normal + low, learned(), datetime.now(UTC)

    def run(wanted: Collection[int]) -> Floats:
        simulation = Simulation(service_time, [Slot("i")] * slots, now, SHARED)
        return asyncio.run(in_turns(simulation.run(line, wanted, behind)))

    together = run(range(len(line)))
    assert numpy.isfinite(together).all()
    for at in range(len(line)):
        numpy.testing.assert_allclose(run([at])[0], together[at], rtol=1e-9)


def test_a_job_that_runs_is_not_delayed_by_those_that_overtake_others() -> None:
    """The first job begins at once, however many come before the second."""
    for per_s in (0.0, 2.0):
        simulation = Simulation(learned(), [Slot("i")], datetime.now(UTC), {})
        line = [Waiting(WORK, {"high": per_s})] * 2
        done = asyncio.run(in_turns(simulation.run(line, [0, 1], behind=0)))
        first, second = numpy.median(done, axis=1)
        assert abs(first - 1.1) < 0.1
        assert (second > 2.4) == (per_s > 0)


def test_an_idle_inferer_comes_before_a_slot_beside_another_job() -> None:
    service_time, now = learned(), datetime.now(UTC)
    slots = [Slot("i"), Slot("i"), Slot("k")]
    simulation = Simulation(service_time, slots, now, SHARED)
    simulation.serve(WORK)
    second = simulation.serve(WORK)
    assert abs(numpy.median(done_s(simulation, second)) - 1.1) < 0.1


def test_running_jobs_are_known_from_events_and_heartbeats() -> None:
    """What has just started is not in its inferer's entry yet; what has ended may still be."""
    jobs = RunningJobs()
    jobs.on_state_event("new", started(ago(0.1)))
    seen = RunningJob(
        id="old",
        attempt=1,
        started_at=ago(9),
        completion_tokens=7,
        max_tokens=9,
        prompt_tokens_left=0,
    )
    assert running(jobs, entry(seen))["old"].prompt_tokens_left == 0
    assert {run.job_id: run.tokens for run in running(jobs, entry(seen)).values()} == {
        "new": 0,
        "old": 7,
    }
    jobs.on_result("old")
    assert set(running(jobs, entry(seen))) == {"new"}
    jobs.on_state_event("new", StateEvent(state="returned", attempt=1, at=ago(0), inferer="i"))
    assert running(jobs, entry(seen)) == {}


def test_a_job_whose_end_was_missed_does_not_run_for_ever() -> None:
    """It is in no entry although it would have been for long."""
    jobs = RunningJobs()
    jobs.on_state_event("ghost", started(ago(60)))
    assert running(jobs, entry()) == {}
    # One that runs again is the later attempt, whatever an entry says of the earlier one.
    jobs.on_state_event("again", started(ago(1), attempt=2))
    seen = RunningJob(id="again", attempt=1, started_at=ago(30), completion_tokens=7, max_tokens=9)
    assert running(jobs, entry(seen))["again"].tokens == 0


def test_a_later_attempt_runs_although_its_start_was_missed() -> None:
    """Its inferer's entry says so; what is known is the end of the one before."""
    for state, attempt in (("retrying", 2), ("returned", 1)):
        jobs = RunningJobs()
        before = RunningJob(id="x", attempt=1, started_at=ago(9), completion_tokens=1, max_tokens=9)
        jobs.on_state_event("x", StateEvent(state=state, attempt=1, at=ago(5), inferer="i"))  # type: ignore[arg-type]
        assert running(jobs, entry(before)) == {}
        now = msgspec.structs.replace(before, attempt=attempt, started_at=ago(2))
        assert running(jobs, entry(now))["x"].number == attempt
        jobs.on_result("x")
        assert running(jobs, entry(now)) == {}


def test_an_attempt_runs_although_the_one_before_is_reported_lost_meanwhile() -> None:
    """The broker refuses the report of the inferer that died, but whoever subscribes gets it."""
    jobs = RunningJobs()
    jobs.on_state_event("x", started(ago(3), attempt=2))
    lost = StateEvent(state="started", attempt=1, at=ago(1), inferer="i", code="worker_lost")
    jobs.on_state_event("x", lost)
    assert running(jobs, entry())["x"].number == 2
    seen = RunningJob(id="x", attempt=2, started_at=ago(3), completion_tokens=5, max_tokens=9)
    assert running(jobs, entry(seen))["x"].tokens == 5
