"""Simulates the queue: when each slot becomes free, and when each waiting job is done."""

import asyncio
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy
from msgspec import Struct

from services.gateway.eta.lengths import Floats
from services.gateway.eta.running_jobs import RunningAttempt
from services.gateway.eta.service_time import MIN_NOISE, ServiceTime
from services.gateway.eta.time_sharing import LEAST_S, Ints, TimeSharing, turn_factor
from shared.retention import MAX_JOB_LIFETIME
from shared.wire.requests import TEXT_TASKS, Work

DRAWS = 128
SEED = 1
"""Fixed, so that two estimates of the same queue agree."""
ALL_DRAWS = numpy.arange(DRAWS)
NO_JOB = -1
LEAST_VARIANCE = 1e-6
"""Of the durations of typical jobs, relative to their mean."""

MAX_ROUNDS = 8
"""Of arrivals while earlier arrivals are served: if more come than can be served, it never ends."""
LIFETIME_S = MAX_JOB_LIFETIME.total_seconds()
"""No job waits longer, whatever comes meanwhile."""

MOST_FOLLOWED = 64
"""How many starts and ends of jobs are simulated after the last wanted job has begun. From then on,
what runs is assumed to go on as it does."""

STEPS_AT_ONCE = 10
"""Before the event loop has its turn. Each takes up to 0.2 ms, 0.7 ms with hundreds of slots, and
several times as long on a busy machine."""


@dataclass(frozen=True)
class Slot:
    """One slot of a live inferer, and the attempt that it runs, if any."""

    inferer: str
    attempt: RunningAttempt | None = None


class Running(NamedTuple):
    """An attempt that runs in the slot with this index."""

    slot: int
    attempt: RunningAttempt
    elapsed_s: float


class Batching(NamedTuple):
    """What an `InfererEntry` says of jobs that run at the same time."""

    slowdowns: Sequence[float] = ()
    jobs_per_batch: int | None = None


class Waiting(Struct, frozen=True):
    """A job that waits; ``work`` is None if its size is not known. Before it, ``unknown_before``
    jobs of unknown size are served, and those that come meanwhile and overtake it: so many per
    second on average, by priority."""

    work: Work | None
    overtaking: Mapping[str, float]
    unknown_before: int = 0


class Simulation:
    """A Monte Carlo simulation: each draw gives every answer a length from the distribution. Jobs
    on one inferer share its time (`TimeSharing`)."""

    def __init__(
        self,
        service_time: ServiceTime,
        slots: list[Slot],
        now: datetime,
        batching: Mapping[str, Batching],
        arrivals_per_s: float = 0.0,
    ) -> None:
        """``slots`` must not be empty, and ``service_time`` needs at least one sample; ``now`` is
        the broker's time. ``batching``: that of each inferer, by its id. ``arrivals_per_s``: how
        many jobs come for these slots on average."""
        self._service_time = service_time
        self._random = numpy.random.default_rng(SEED)
        # What makes one job slow, a busy machine, also slows the next one: so all jobs of a draw
        # have the same residual. If each had its own, they would average out over a queue.
        self._residuals = service_time.sample_residuals(self._random, DRAWS)

        names = {name: at for at, name in enumerate(dict.fromkeys(s.inferer for s in slots))}
        self._inferer = numpy.array([names[slot.inferer] for slot in slots])
        speeds = [service_time.speed(name) for name in names]
        self._start_s = numpy.array([speed.start_s for speed in speeds])[self._inferer]
        self._prompt_token_s = numpy.array([speed.prompt_s for speed in speeds])[self._inferer]
        self._token_s = numpy.array([speed.token_s for speed in speeds])[self._inferer]
        self._sizes = numpy.bincount(self._inferer)
        most = int(self._sizes.max())
        known = [batching.get(name, Batching()) for name in names]
        self._slowdown = numpy.array([_slowdowns(one.slowdowns, most) for one in known])
        self._per_batch = numpy.array([one.jobs_per_batch or most for one in known])
        self._time = TimeSharing(self._inferer, self._slowdown, self._per_batch, DRAWS)
        # Where no job runs beside another, those that come later change nothing.
        self._arrivals_per_s = arrivals_per_s if most > 1 else 0.0
        self._now_s = numpy.zeros(DRAWS)
        """When the last job began: those that wait begin in their order."""
        running: dict[str, list[Running]] = {}
        for at, slot in enumerate(slots):
            if slot.attempt is not None:
                one = Running(at, slot.attempt, slot.attempt.elapsed_s(now))
                running.setdefault(slot.inferer, []).append(one)
        busy = [one.slot for together in running.values() for one in together]
        self._free = numpy.full(DRAWS, len(slots) - len(busy))
        self._number = numpy.full((len(slots), DRAWS), NO_JOB)
        """Of the job in each slot. Those that run come first, then jobs as they begin."""
        self._number[busy] = numpy.arange(len(busy))[:, None]
        self._skipped_s = numpy.zeros(DRAWS)
        """The time that was skipped so far for jobs of unknown size; jobs that run meanwhile do not
        end later."""
        self._skipped_before_s = [self._skipped_s] * len(busy)
        """The same when each job began, by its number."""
        self._ended: list[tuple[Ints, Ints, Floats]] = []
        """The numbers of jobs that are done, the draws, and when, without what was skipped."""
        self._overtaken_until_s: dict[str, Floats] = {}
        """Up to when the jobs that come and overtake others were served, by priority."""
        if busy:
            left = [
                one
                for together in running.values()
                for one in self._left(sorted(together, key=lambda one: -one.elapsed_s), now)
            ]
            left.sort(key=lambda one: -one[0].elapsed_s)
            oldest, prompts_s, answers_s = zip(*left, strict=True)
            slots_of = numpy.array([one.slot for one in oldest])
            self._time.resume(slots_of, numpy.array(prompts_s), numpy.array(answers_s))

    @property
    def next_free_s(self) -> Floats:
        """Seconds until some slot is free, in each draw."""
        free_s: Floats = numpy.where(self._free > 0, self._now_s, self._time.end_s.min(axis=0))
        return free_s

    def run(
        self, line: Sequence[Waiting], wanted: Collection[int], behind: int
    ) -> Generator[None, None, Floats]:
        """Serve the jobs of ``line``, behind which ``behind`` others wait, in steps. Returns the
        seconds until those at ``wanted`` are done, a row for each."""
        next_arrival_s = numpy.full(DRAWS, 0.0 if self._arrivals_per_s else numpy.inf)
        jobs: list[int] = []
        for at, job in enumerate(line):
            if job.unknown_before:
                self.serve_typical(job.unknown_before)
            self.serve_arrivals(job.overtaking)
            number = self.serve(job.work)
            if at in wanted:
                jobs.append(number)
            if len(jobs) == len(wanted):
                waiting = numpy.full(DRAWS, len(line) - at - 1 + behind)
                if self._are_settled(jobs, waiting, next_arrival_s):
                    break
            yield
        return (yield from self.follow(jobs, behind))

    def follow(self, jobs: Sequence[int], behind: int) -> Generator[None, None, Floats]:
        """Go on until ``jobs``, which have begun, are done, while ``behind`` jobs that wait, and
        those that come, take the slots that are free; in steps. Returns the seconds until each is
        done."""
        waiting = numpy.full(DRAWS, behind)
        next_arrival_s = numpy.full(DRAWS, numpy.inf)
        if self._arrivals_per_s:
            expected = numpy.minimum(self._arrivals_per_s * self._now_s, MOST_FOLLOWED)
            waiting += self._random.poisson(expected)
            next_arrival_s = self._now_s + self._sample_gap_s()
        for _ in range(MOST_FOLLOWED):
            if self._are_settled(jobs, waiting, next_arrival_s):
                break
            begins = (waiting > 0) & (self._free > 0)
            end_s = self._time.end_s.min(axis=0)
            arrives = ~begins & (next_arrival_s < end_s)
            ends = ~begins & ~arrives & numpy.isfinite(end_s)
            if self._arrivals_per_s:
                self._now_s = numpy.where(arrives, next_arrival_s, self._now_s)
                next_arrival_s = numpy.where(
                    arrives, next_arrival_s + self._sample_gap_s(), next_arrival_s
                )
                waiting += arrives
                begins |= arrives & (self._free > 0)
            self._end_first(numpy.flatnonzero(ends & (waiting == 0)))
            begins |= ends & (waiting > 0)
            waiting -= begins
            if begins.any():
                self._serve(None, numpy.flatnonzero(begins))
            yield
        self._note_end(*numpy.nonzero(self._number != NO_JOB))
        numbers, draws, ended_s = map(numpy.concatenate, zip(*self._ended, strict=True))
        done_s = numpy.array([*self._skipped_before_s, self._skipped_s])
        """By the numbers of jobs; the last row is that of `NO_JOB`."""
        done_s[numbers, draws] += ended_s
        return done_s[jobs]

    def _are_settled(self, jobs: Sequence[int], waiting: Ints, next_arrival_s: Floats) -> bool:
        """Whether no other job begins or ends beside one of ``jobs`` before that is done: while
        ``waiting`` jobs wait in each draw, and the next one comes at ``next_arrival_s``."""
        is_free = self._free > 0
        if (is_free & (waiting > 0)).any():
            return False
        is_wanted = numpy.zeros(len(self._skipped_before_s) + 1, dtype=bool)
        """By the numbers of jobs; the last is `NO_JOB`."""
        is_wanted[jobs] = True
        next_s = numpy.minimum(
            self._time.first_end_s, numpy.where(is_free, next_arrival_s, numpy.inf)
        )
        return not (is_wanted[self._number] & (self._time.end_s > next_s)).any()

    def serve(self, work: Work | None) -> int:
        """Give a job to the slot that is free first, on the inferer with the fewest jobs; None
        stands for a typical one. Returns its number."""
        return self._serve(work, ALL_DRAWS)

    def _serve(self, work: Work | None, draws: Ints) -> int:
        """The same in some draws. The others use as many random numbers."""
        prompt_tokens, tokens = self._sample_tokens(work)
        number = len(self._skipped_before_s)
        self._skipped_before_s.append(self._skipped_s)
        slots = self._time.end_s.argmin(axis=0)
        is_free = self._free > 0
        if is_free.any():
            slots = numpy.where(is_free, self._time.emptiest, slots)
        factors = self._sample_factors()
        prompt_s = (self._start_s[slots] + prompt_tokens * self._prompt_token_s[slots]) * factors
        answer_s = tokens * self._token_s[slots] * factors
        slots, is_free = slots[draws], is_free[draws]
        ended_s = self._note_end(slots, draws)
        at_s = numpy.where(is_free, self._now_s[draws], ended_s)
        self._now_s[draws] = at_s
        self._free[draws] -= is_free
        self._number[slots, draws] = number
        self._time.begin(slots, draws, at_s, prompt_s[draws], answer_s[draws])
        return number

    def serve_typical(self, count: int | Ints) -> None:
        """Serve ``count`` jobs of unknown size, in one step; as an array, those of each draw."""
        count = numpy.maximum(count, 0)
        if not count.any():
            return
        prompt_tokens, tokens = self._service_time.sample_tokens(self._random, DRAWS)
        jobs = self._sizes[self._inferer]
        slowdown = self._slowdown[self._inferer, jobs - 1]
        job_s = (jobs * self._start_s)[:, None] + (
            numpy.outer(jobs * self._prompt_token_s, prompt_tokens)
            + numpy.outer(slowdown * self._token_s, tokens)
        )
        job_s = numpy.maximum(job_s, LEAST_S)
        mean_s = 1 / (1 / job_s.mean(axis=1)).sum()
        # Their sum, taken for a gamma distribution, which it nearly is.
        variance = max(float((job_s.std(axis=1) / job_s.mean(axis=1)).max() ** 2), LEAST_VARIANCE)
        sum_s = self._random.gamma(count / variance, variance * mean_s, DRAWS)
        skipped_s = sum_s * self._residuals
        self._now_s += skipped_s
        self._skipped_s = self._skipped_s + skipped_s
        self._time.skip(skipped_s)

    def serve_arrivals(self, per_s: Mapping[str, float]) -> None:
        """Serve the jobs of some priorities that come before the next slot is free and overtake
        those that wait, and those that come meanwhile; so many ``per_s`` on average."""
        if not any(per_s.values()):
            return
        expected = numpy.zeros(DRAWS)
        for priority, rate in per_s.items():
            since_s = self._overtaken_until_s.get(priority, 0.0)
            expected += rate * numpy.clip(self.next_free_s - since_s, 0.0, LIFETIME_S)
        for _ in range(MAX_ROUNDS):
            count = self._random.poisson(expected)
            if not count.any():
                break
            free_s = self.next_free_s
            self.serve_typical(count)
            expected = sum(per_s.values()) * numpy.minimum(self.next_free_s - free_s, LIFETIME_S)
        self._overtaken_until_s |= dict.fromkeys(per_s, self.next_free_s)

    def _end_first(self, draws: Ints) -> None:
        """The job that is done first ends in each of ``draws``."""
        if not draws.size:
            return
        slots = self._time.end_s[:, draws].argmin(axis=0)
        self._now_s[draws] = self._note_end(slots, draws)
        self._number[slots, draws] = NO_JOB
        self._free[draws] += 1
        self._time.end(slots, draws)

    def _note_end(self, slots: Ints, draws: Ints) -> Floats:
        """Note when the jobs in ``slots`` of ``draws`` are done, if there are any. Returns these
        times."""
        end_s: Floats = self._time.end_s[slots, draws]
        skipped_s = self._skipped_s[draws]
        self._ended.append((self._number[slots, draws], draws, end_s - skipped_s))
        return end_s

    def _left(
        self, together: Sequence[Running], now: datetime
    ) -> Iterator[tuple[Running, Floats, Floats]]:
        """What is left of the attempts on one inferer, which began in this order: the seconds that
        the prompt and the answer of each would take alone, in each draw."""
        reports = [self._prompt_reported(one, now) for one in together]
        computed_s, generated_s = _since_reports(*numpy.array(reports).T)
        jobs = len(together)
        for older, (slot, attempt, _) in enumerate(together):
            work = attempt.work or self._service_time.typical_work()
            inferer, token_s = self._inferer[slot], self._token_s[slot]
            factor = turn_factor(jobs, int(self._per_batch[inferer]), older)
            slowdown = float(self._slowdown[inferer, jobs - 1] * factor)
            so_far = attempt.tokens + int(max(generated_s[older], 0.0) / (slowdown * token_s))
            so_far = min(so_far, work.most_tokens - 1)
            lengths = self._sample_lengths(work, beyond=so_far)
            factors = self._sample_factors()
            prompt_s, _ = reports[older]
            prompt_left_s = numpy.maximum(prompt_s * factors - computed_s[older], 0.0)
            # At least the token that is being computed.
            least = 1.0 if work.task in TEXT_TASKS else 0.0
            answer_s = numpy.maximum((lengths - so_far) * factors, least) * token_s
            yield together[older], prompt_left_s, answer_s

    def _prompt_reported(self, one: Running, now: datetime) -> tuple[float, float]:
        """The seconds that the rest of its prompt takes, as last reported, and the age of that
        report. Before the first, the whole prompt, and the time since the start."""
        slot, attempt, elapsed_s = one
        if attempt.tokens or attempt.prompt_tokens_left is not None:
            left_s = (attempt.prompt_tokens_left or 0) * float(self._prompt_token_s[slot])
            return left_s, attempt.since_heartbeat_s(now)
        work = attempt.work or self._service_time.typical_work()
        tokens = self._service_time.prompt_tokens(work.prompt_bytes)
        return float(self._start_s[slot] + tokens * self._prompt_token_s[slot]), elapsed_s

    def _sample_factors(self) -> Floats:
        """How many times as long as expected a job takes, in each draw."""
        noise: Floats = numpy.exp(self._random.normal(0, MIN_NOISE, DRAWS))
        return self._residuals * noise

    def _sample_gap_s(self) -> Floats:
        """Seconds between two jobs that come."""
        return self._random.exponential(1 / self._arrivals_per_s, DRAWS)

    def _sample_tokens(self, work: Work | None) -> tuple[Floats | float, Floats]:
        """Tokens to compute of the prompt, and tokens of the answer, in each draw."""
        if work is None:
            return self._service_time.sample_tokens(self._random, DRAWS)
        tokens = self._sample_lengths(work, beyond=0)
        return self._service_time.prompt_tokens(work.prompt_bytes), tokens

    def _sample_lengths(self, work: Work, beyond: int) -> Floats:
        """Tokens of all answers together, of which there are ``beyond``, in each draw; 0 for a task
        that has none."""
        if work.task not in TEXT_TASKS:
            return numpy.zeros(DRAWS)
        if work.n == 1:
            return self._sample_length(work, beyond)
        answers = [self._sample_length(work, 0) for _ in range(work.n)]
        totals = numpy.sum(answers, axis=0)
        longer = totals[totals > beyond]
        # Where none is longer, the last answer is.
        return self._random.choice(longer, DRAWS) if longer.size else beyond + answers[-1]

    def _sample_length(self, work: Work, beyond: int) -> Floats:
        """Latin hypercube sampling: a length from each of equal parts of the distribution, in
        random order. So fewer draws are as accurate."""
        uniform = (ALL_DRAWS + 1 - self._random.random(DRAWS)) / DRAWS  # never 0
        return self._random.permutation(self._service_time.lengths.sample(work, beyond, uniform))


async def in_turns(steps: Generator[None, None, Floats]) -> Floats:
    """Run a simulation to its end without holding the event loop."""
    taken = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Floats = end.value
            return found
        taken += 1
        if taken % STEPS_AT_ONCE == 0:
            await asyncio.sleep(0)


def _since_reports(prompt_s: Floats, since_s: Floats) -> tuple[Floats, Floats]:
    """How many seconds of each prompt were computed since its last report, and how many seconds its
    answer was generated, in the order in which the jobs began. The shortest prompt comes first, and
    answers wait for all of them, as in the inferer's scheduler. ``prompt_s`` is what was left of
    the prompts at those reports, and ``since_s`` their age."""
    # How much of the time since the report of each row the prompt of each column took.
    age_s = since_s[:, None]
    taken_s = numpy.where(
        since_s <= age_s,
        numpy.minimum(prompt_s, since_s),
        numpy.clip(prompt_s - (since_s - age_s), 0.0, age_s),
    )
    numpy.fill_diagonal(taken_s, 0.0)
    rank = prompt_s.argsort(kind="stable").argsort(kind="stable")
    before_s = numpy.where(rank < rank[:, None], taken_s, 0.0).sum(axis=1)
    return numpy.maximum(since_s - before_s, 0.0), since_s - prompt_s - taken_s.sum(axis=1)


def _slowdowns(reported: Sequence[float], most: int) -> list[float]:
    """For 1 to ``most`` jobs at once. An inferer reports as many as it has slots; one of an earlier
    version reports none."""
    known = [*reported[:most]] or [1.0]
    return known + [known[-1]] * (most - len(known))
