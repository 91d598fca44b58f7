"""How accurate an ETA can be at best, and how accurate ours is beside that, without the noise of a
machine.

An inferer is simulated: the real scheduler, with steps that take as long as SmolLM2-135M took on
two cores of an EPYC with AVX-512, and answers as long as those it gave in `benchmarks.eta`, whose
jobs these are. The gateway's estimate is computed by the real code, as if a heartbeat had just
come. Beside it stands an estimate that nobody can make: it knows the state of the inferer, how long
a step takes, the distribution of answer lengths and the rate of arrivals. It does not know the
future: how long the answers that are not finished will be, and when other jobs will come. An error
that is smaller than this one's is luck.

    .venv/bin/python -m benchmarks.eta_limits
"""

import asyncio
import random
import statistics
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy

from benchmarks.measuring import arguments, spread
from services.gateway.eta.forecast import rank
from services.gateway.eta.position import higher_than
from services.gateway.eta.running_jobs import RunningAttempt
from services.gateway.eta.service_time import ServiceTime
from services.gateway.eta.simulation import Batching, Simulation, Slot, Waiting, in_turns
from services.gateway.state.arrivals import Arrivals
from services.inferer.engine.scheduler import Scheduler
from services.inferer.engine.sequence import Sequence, State
from services.inferer.engine.step_times import StepTimes
from shared.timestamps import timestamp
from shared.wire.requests import Work
from shared.wire.results import Completed, Timings, Usage
from shared.wire.subjects import PRIORITIES

SEEDS, JOBS, WARM_UP, LOAD = 3, 120, 48, 0.8
GUESSES = 40
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
BATCH_TOKENS = 512

STEP_S = (0.0062, 0.0072)
"""With one sequence, and with two, each in a context of its own. More take turns."""
PROMPT_TOKEN_S, OVERHEAD_S = 0.0023, 0.012

KINDS = {
    32: (40, 42, (4, 7, 7, 7, 7, 7, 7, 10, 21, 32, 32)),
    48: (1130, 274, (12, 27, 40, 48, 48, 48, 48, 48, 48, 48, 48)),
    64: (40, 39, (27, 55, 64, 64, 64, 64, 64, 64, 64, 64, 64)),
    96: (30, 36, (29, 36, 52, 60, 64, 68, 78, 90, 96, 96, 96)),
    160: (40, 39, (160,)),
}
"""By ``max_tokens``: the bytes and tokens of a prompt, and the deciles of its answers' tokens."""


@dataclass(frozen=True)
class Situation:
    slots: int = 1
    priorities: tuple[str, ...] = ("normal",)


SITUATIONS = {
    "1 slot": Situation(),
    "2 slots": Situation(2),
    "4 slots": Situation(4),
    "priorities": Situation(priorities=("high", "normal", "normal", "low")),
}


class Job(Sequence):
    """Each token is its own position."""

    def __init__(self, number: int, dice: random.Random, priorities: tuple[str, ...]) -> None:
        super().__init__()
        max_tokens = dice.choice(list(KINDS))
        prompt_bytes, self.prompt_tokens, self.lengths = KINDS[max_tokens]
        self.number = number
        self.work = Work(prompt_bytes=prompt_bytes, max_tokens=max_tokens, task="chat")
        self.priority = dice.choice(priorities)
        self.answer_tokens = dice.choice(self.lengths)
        self.tokens += range(self.prompt_tokens)
        self.came_s = self.began_s = self.first_token_s = self.ended_s = 0.0
        self.prompt_delay_s = 0.0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens


@dataclass
class Inferer:
    """Steps of the scheduler, on a clock of its own. ``ended`` are the jobs that it has done."""

    slots: int
    now_s: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    ended: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler: Scheduler[Job] = Scheduler(self.slots, BATCH_TOKENS)
        # What it measures counts, whatever this machine does meanwhile.
        self.scheduler.step_times = StepTimes(lambda: 0.0)

    @property
    def running(self) -> list[Job]:
        return [job for job in self.scheduler if job.state is State.RUNNING]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and self.scheduler.is_idle

    def submit(self, job: Job) -> None:
        job.came_s = self.now_s
        self.waiting.append(job)
        self.waiting.sort(key=lambda one: (rank(one.priority), one.came_s))
        self._begin()

    def run(self, until_s: float) -> None:
        """Compute until then; the last step may take longer."""
        while self.now_s < until_s:
            if self.is_idle:
                self.now_s = until_s
            else:
                self._step()

    def finish(self) -> None:
        """Compute until all jobs are done."""
        while not self.is_idle:
            self._step()

    def _begin(self) -> None:
        while self.waiting and self.scheduler.free_slots:
            job = self.waiting.pop(0)
            job.began_s = self.now_s
            self.scheduler.add(job)
            self.scheduler.admit(self.scheduler.free_slots[-1])

    def _step(self) -> None:
        batch = self.scheduler.next_batch(len(STEP_S))
        generating = sum(bool(chunk.sequence.generated) for chunk in batch)
        prompt_tokens = sum(chunk.size for chunk in batch) - generating
        step_s = PROMPT_TOKEN_S * prompt_tokens
        if generating:
            step_s += STEP_S[generating - 1]
        if generating < len(batch):
            step_s += OVERHEAD_S
        self.now_s += step_s
        for chunk in self.scheduler.complete(batch, step_s):
            job = chunk.sequence
            if not job.generated:
                job.first_token_s, job.prompt_delay_s = self.now_s, job.delay_s
            job.tokens.append(job.position)
            if job.generated == job.answer_tokens:
                self.scheduler.remove(job)
                job.ended_s = self.now_s
                self.ended.append(job)
        self._begin()


def main() -> None:
    arguments(__doc__).parse_args()
    print(
        f"error of p50, how many were later, and how many p90 covers: {SEEDS} seeds of {JOBS} jobs"
    )
    for name, situation in SITUATIONS.items():
        ours, best = [], []
        for seed in range(SEEDS):
            for job, our_s, best_s in _measure(situation, seed):
                true_s = job.ended_s - job.came_s
                ours.append(_judged(our_s, true_s))
                best.append(_judged(best_s, true_s))
        print(f"  {name}: {len(ours)} jobs waited")
        for who, judged in (("ours", ours), ("the best possible", best)):
            errors = spread([error for error, _, _ in judged])
            is_early = statistics.mean(is_early for _, is_early, _ in judged)
            covered = statistics.mean(is_covered for _, _, is_covered in judged)
            print(f"    {who:18} {errors}, {is_early:.0%}, {covered:.0%}", flush=True)


def _judged(done_s: Iterable[float], true_s: float) -> tuple[float, bool, bool]:
    """The error of p50, whether it was too early, and whether p90 was not."""
    p50_s, p90_s = numpy.quantile(list(done_s), (0.5, 0.9))
    return float(abs(p50_s - true_s) / true_s), bool(p50_s < true_s), bool(true_s <= p90_s)


def _measure(
    situation: Situation, seed: int
) -> Iterator[tuple[Job, Iterable[float], Iterable[float]]]:
    """Jobs that waited, with what both estimates said when they came: the seconds until they are
    done, in many draws."""
    dice, inferer, gateway = random.Random(seed), Inferer(situation.slots), Gateway(situation.slots)
    for number in range(WARM_UP):
        inferer.submit(Job(number, dice, situation.priorities))
    inferer.finish()
    per_s = LOAD * WARM_UP / inferer.now_s
    estimated = []
    for number in range(JOBS):
        gateway.learn(inferer)
        job = Job(WARM_UP + number, dice, situation.priorities)
        inferer.submit(job)
        gateway.note(job, inferer.now_s)
        if job.state is State.NEW:
            ours_s = gateway.estimate(job, inferer)
            best_s = [_guess(job, inferer, per_s, situation, dice) for _ in range(GUESSES)]
            estimated.append((job, ours_s, best_s))
        inferer.run(inferer.now_s + dice.expovariate(per_s))
    inferer.finish()
    yield from estimated


def _guess(
    wanted: Job, inferer: Inferer, per_s: float, situation: Situation, dice: random.Random
) -> float:
    """When ``wanted`` may be done: with other lengths of unfinished answers, and other arrivals."""
    other = deepcopy(inferer)
    began_s, number = other.now_s, -1
    for job in [*other.running, *other.waiting]:
        longer = [length for length in job.lengths if length > job.generated]
        job.answer_tokens = dice.choice(longer)
    other.ended.clear()
    while all(job.number != wanted.number for job in other.ended):
        other.run(other.now_s + dice.expovariate(per_s))
        other.submit(Job(number, dice, situation.priorities))
        number -= 1
    (done,) = (job for job in other.ended if job.number == wanted.number)
    return done.ended_s - began_s


class Gateway:
    """What a gateway knows of the inferer, and its estimate."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._now_s = 0.0
        self._service_time = ServiceTime()
        self._arrivals = Arrivals(lambda: self._now_s)
        self._learned = 0

    def learn(self, inferer: Inferer) -> None:
        """From the results."""
        for job in inferer.ended[self._learned :]:
            self._service_time.observe(_result(job))
        self._learned = len(inferer.ended)

    def note(self, job: Job, now_s: float) -> None:
        """A job has come."""
        self._now_s = now_s
        self._arrivals.note(("model", job.priority))

    def estimate(self, job: Job, inferer: Inferer) -> Iterable[float]:
        """Seconds until ``job`` is done, in each draw."""
        per_s = {one: self._arrivals.per_s("model", [one]) for one in PRIORITIES}
        running = inferer.running
        attempts = [
            RunningAttempt(
                str(one.number),
                1,
                "i",
                _at(one.began_s),
                one.work,
                one.generated,
                _at(self._now_s),
                0 if one.generated else one.remaining,
            )
            for one in running
        ]
        slots = [Slot("i", attempt) for attempt in attempts]
        slots += [Slot("i")] * (self._slots - len(slots))
        slowdowns = inferer.scheduler.step_times.slowdowns(self._slots, len(STEP_S))
        line = [
            Waiting(one.work, {higher: per_s[higher] for higher in higher_than(one.priority)})
            for one in inferer.waiting
        ]
        simulation = Simulation(
            self._service_time,
            slots,
            BEGAN + timedelta(seconds=self._now_s),
            {"i": Batching(slowdowns, len(STEP_S))},
            sum(per_s.values()),
        )
        wanted = inferer.waiting.index(job)
        (done_s,) = asyncio.run(in_turns(simulation.run(line, [wanted], 0)))
        return map(float, done_s)


def _result(job: Job) -> Completed:
    prompt_s, total_s = job.first_token_s - job.began_s, job.ended_s - job.began_s
    return Completed(
        id=str(job.number),
        model="model",
        attempt=1,
        queued_at=_at(job.came_s),
        started_at=_at(job.began_s),
        finished_at=_at(job.ended_s),
        inferer="i",
        timings=Timings(
            queued_ms=1000 * (job.began_s - job.came_s),
            prompt_ms=1000 * prompt_s,
            generation_ms=1000 * (total_s - prompt_s),
            total_ms=1000 * total_s,
            prompt_delay_ms=1000 * job.prompt_delay_s,
            generation_delay_ms=1000 * (job.delay_s - job.prompt_delay_s),
        ),
        text="",
        finish_reason="length" if job.answer_tokens == job.work.max_tokens else "stop",
        usage=Usage(job.prompt_tokens, job.answer_tokens, job.prompt_tokens + job.answer_tokens),
        task="chat",
        work=job.work,
    )


def _at(seconds: float) -> str:
    return timestamp(BEGAN + timedelta(seconds=seconds))


if __name__ == "__main__":
    main()
