"""Simulates the queue: when each slot becomes free, and when each waiting job is done."""

import asyncio
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy
from msgspec import Struct
from numpy.typing import NDArray

from services.gateway.eta.lengths import Floats
from services.gateway.eta.running_jobs import RunningAttempt
from services.gateway.eta.service_time import ServiceTime
from shared.wire.requests import Work

DRAWS = 200
SEED = 1
"""Fixed, so that two estimates of the same queue agree."""
ALL_DRAWS = numpy.arange(DRAWS)
HALF = 0.5**0.5
LEAST = 1e-9
"""In place of 0, for a job that has not ended."""

MAX_ROUNDS = 8
"""Of arrivals while earlier arrivals are served: if more come than can be served, it never ends."""

MOST_FOLLOWED = 64
"""How many starts and ends of jobs are simulated after the last wanted job has begun. From then on,
what runs is assumed to go on as it does."""

STEPS_AT_ONCE = 20
"""Before the event loop has its turn. Each takes about a tenth of a millisecond, and several times
as long on a busy machine."""

Ints = NDArray[numpy.int64]


@dataclass(frozen=True)
class Slot:
    """One slot of a live inferer, and the attempt that it runs, if any."""

    inferer: str
    attempt: RunningAttempt | None = None


class Waiting(Struct, frozen=True):
    """A job that waits; ``work`` is None if its size is not known. Before it, ``unknown_before``
    jobs of unknown size are served, and those that come meanwhile and overtake it: so many per
    second on average, by priority."""

    work: Work | None
    overtaking: Mapping[str, float]
    unknown_before: int = 0


class Simulation:
    """A Monte Carlo simulation: each draw gives every answer a length from the distribution.

    Jobs on one inferer share its time: while n of them run, the prompt of each takes n times as
    long as alone, and each token as many times as long as the inferer reports for n. So when a job
    begins or ends, the ends of the others on the same inferer change.
    """

    def __init__(
        self,
        service_time: ServiceTime,
        slots: list[Slot],
        now: datetime,
        slowdowns: Mapping[str, Sequence[float]],
    ) -> None:
        """``slots`` must not be empty, and ``service_time`` needs at least one sample; ``now`` is
        the broker's time. ``slowdowns``: those of each `InfererEntry`, by its id."""
        self._service_time = service_time
        self._random = numpy.random.default_rng(SEED)
        # What makes one job slow, a busy machine, also slows the next one: half of the residual is
        # common to all jobs of a draw.
        self._common = service_time.sample_residuals(self._random, DRAWS) ** HALF
        speeds = [service_time.speed(slot.inferer) for slot in slots]
        self._prompt_token_s = numpy.array([speed.prompt_s for speed in speeds])
        self._token_s = numpy.array([speed.token_s for speed in speeds])

        names = {name: at for at, name in enumerate(dict.fromkeys(s.inferer for s in slots))}
        self._inferer = numpy.array([names[slot.inferer] for slot in slots])
        sizes = numpy.bincount(self._inferer)
        self._most = int(sizes.max())
        # One row more than there are slots, which stays free, stands for the missing slots of
        # smaller inferers.
        shape = (len(slots) + 1, DRAWS)
        self._slots_of = numpy.full((len(names), self._most), len(slots))
        for inferer, size in enumerate(sizes):
            self._slots_of[inferer, :size] = numpy.flatnonzero(self._inferer == inferer)
        self._slowdown = numpy.array(
            [_slowdowns(slowdowns.get(name, ()), self._most) for name in names]
        )
        self._now_s = numpy.zeros(DRAWS)
        """When the last job began: those that wait begin in their order."""
        self._jobs = numpy.zeros((len(names), DRAWS), dtype=int)
        """How many run on each inferer."""
        self._free = numpy.full(DRAWS, len(slots))
        self._prompt_s, self._answer_s = numpy.zeros(shape), numpy.zeros(shape)
        """What the job in each slot takes alone."""
        self._left, self._since_s = numpy.zeros(shape), numpy.zeros(shape)
        """The share of it that was left at a time; 0 if the slot is free."""
        self._end_s = numpy.full(shape, numpy.inf)
        """When it ends if no other begins or ends."""
        self._number = numpy.zeros(shape, dtype=int)
        """Of the job in each slot. Those that run come first, then jobs as they begin."""
        self._done_s = numpy.empty((0, DRAWS))
        """When each job was done, by its number."""
        self._skipped_s = numpy.zeros(DRAWS)
        """The time that was skipped so far for jobs of unknown size; jobs that run meanwhile do not
        end later."""
        self._skipped_before_s = numpy.zeros(shape)
        """The same when the job in each slot began."""
        self._overtaken_until_s: dict[str, Floats] = {}
        """Up to when the jobs that come and overtake others were served, by priority."""

        running = [at for at, slot in enumerate(slots) if slot.attempt is not None]
        jobs = numpy.bincount(self._inferer[running], minlength=len(names))
        for at in running:
            attempt = slots[at].attempt
            assert attempt is not None
            remaining = self._remaining_s(at, attempt, int(jobs[self._inferer[at]]), now)
            self._prompt_s[at], self._answer_s[at] = remaining
            self._number[at] = self._new_number()
        beside = jobs[self._inferer[running]][:, None]
        self._jobs += jobs[:, None]
        self._free -= len(running)
        self._left[running] = 1.0
        self._end_s[running] = numpy.maximum(
            beside * self._prompt_s[running]
            + numpy.take_along_axis(self._slowdown[self._inferer[running]], beside - 1, axis=1)
            * self._answer_s[running],
            LEAST,
        )

    @property
    def next_free_s(self) -> Floats:
        """Seconds until some slot is free, in each draw."""
        next_end_s = self._end_s.min(axis=0)
        free_s: Floats = numpy.where(self._free > 0, self._now_s, next_end_s)
        return free_s

    def run(
        self, line: Sequence[Waiting], wanted: Collection[int], behind: int
    ) -> Generator[None, None, Floats]:
        """Serve the jobs of ``line``, behind which ``behind`` others wait, in steps. Returns the
        seconds until those at ``wanted`` are done, a row for each."""
        jobs: list[int] = []
        for at, job in enumerate(line):
            self.serve_typical(job.unknown_before)
            self.serve_arrivals(job.overtaking)
            number = self.serve(job.work or self._service_time.typical_work())
            if at in wanted:
                jobs.append(number)
            left = len(line) - at - 1
            if len(jobs) == len(wanted) and self._are_settled(jobs, left + behind):
                break
            yield
        return (yield from self.follow(jobs, behind))

    def follow(self, jobs: Sequence[int], behind: int) -> Generator[None, None, Floats]:
        """Go on until ``jobs``, which have begun, are done, while ``behind`` jobs that wait take
        the slots that become free; in steps. Returns the seconds until each is done."""
        for _ in range(MOST_FOLLOWED):
            if self._are_settled(jobs, behind):
                break
            if behind:
                behind -= 1
                self.serve(self._service_time.typical_work())
            else:
                self._end_first()
            yield
        self._note_end(*numpy.nonzero(self._left))
        done_s: Floats = self._done_s[jobs]
        return done_s

    def _are_settled(self, jobs: Sequence[int], waiting: int) -> bool:
        """Whether no other job begins or ends beside one of ``jobs`` before that is done, while so
        many are ``waiting``."""
        if waiting and self._free.any():
            return False
        first_s = self._end_s[self._slots_of].min(axis=1)
        is_first = self._end_s[:-1] <= first_s[self._inferer]
        is_wanted = numpy.isin(self._number[:-1], jobs) & (self._left[:-1] > 0)
        return bool(is_first[is_wanted].all())

    def serve(self, work: Work) -> int:
        """Give ``work`` to the slot that is free first, on the inferer with the fewest jobs.
        Returns the number of the job."""
        slots = self._end_s.argmin(axis=0)
        is_full = self._free == 0
        if not is_full.all():
            jobs = numpy.where(self._left[:-1] > 0, self._most, self._jobs[self._inferer])
            slots = numpy.where(is_full, slots, jobs.argmin(axis=0))
        full, others = numpy.flatnonzero(is_full), numpy.flatnonzero(~is_full)
        self._note_end(slots[full], full)
        self._now_s[full] = self._end_s[slots[full], full]

        here = slots, ALL_DRAWS
        prompt_tokens = self._service_time.prompt_tokens(work.prompt_bytes)
        tokens = self._sample_lengths(work, beyond=0)
        residuals = self._sample_residuals()
        self._prompt_s[here] = prompt_tokens * self._prompt_token_s[slots] * residuals
        self._answer_s[here] = tokens * self._token_s[slots] * residuals
        self._number[here] = number = self._new_number()
        self._skipped_before_s[here] = self._skipped_s
        self._set_left(slots[others], others, self._now_s[others], 1.0)
        # Where it takes the place of another, nothing changes for the jobs beside it.
        here = slots[full], full
        self._left[here] = 1.0
        self._since_s[here] = self._now_s[full]
        durations_s = self._durations_s(self._inferer[slots[full]], here)
        self._end_s[here] = self._now_s[full] + durations_s
        return number

    def serve_typical(self, count: int | Ints) -> None:
        """Serve ``count`` jobs of unknown size, in one step; as an array, those of each draw."""
        count = numpy.maximum(count, 0)
        if count.any():
            work = self._service_time.typical_work()
            prompt_tokens = self._service_time.prompt_tokens(work.prompt_bytes)
            tokens = self._sample_lengths(work, beyond=0).mean()
            jobs = numpy.bincount(self._inferer)[self._inferer]
            job_s = (
                jobs * prompt_tokens * self._prompt_token_s
                + self._slowdown[self._inferer, jobs - 1] * tokens * self._token_s
            )
            all_s = count / (1 / job_s).sum() * self._common
            for times_s in (self._now_s, self._since_s, self._end_s, self._skipped_s):
                times_s += all_s

    def serve_arrivals(self, per_s: Mapping[str, float]) -> None:
        """Serve the jobs of some priorities that come before the next slot is free and overtake
        those that wait, and those that come meanwhile; so many ``per_s`` on average."""
        if not any(per_s.values()):
            return
        expected = numpy.zeros(DRAWS)
        for priority, rate in per_s.items():
            since_s = self._overtaken_until_s.get(priority, 0.0)
            expected += rate * numpy.maximum(self.next_free_s - since_s, 0.0)
        for _ in range(MAX_ROUNDS):
            count = self._random.poisson(expected)
            if not count.any():
                break
            free_s = self.next_free_s
            self.serve_typical(count)
            expected = sum(per_s.values()) * (self.next_free_s - free_s)
        self._overtaken_until_s |= dict.fromkeys(per_s, self.next_free_s)

    def _end_first(self) -> None:
        """In each draw in which a job runs, the one that is done first ends."""
        slots = self._end_s.argmin(axis=0)
        running = numpy.flatnonzero(numpy.isfinite(self._end_s[slots, ALL_DRAWS]))
        self._note_end(slots[running], running)
        self._now_s[running] = self._end_s[slots[running], running]
        self._set_left(slots[running], running, self._now_s[running], 0.0)

    def _note_end(self, slots: Ints, draws: Ints) -> None:
        """Note when the jobs in ``slots`` of ``draws`` are done."""
        here = slots, draws
        skipped_s = self._skipped_s[draws] - self._skipped_before_s[here]
        self._done_s[self._number[here], draws] = self._end_s[here] - skipped_s

    def _new_number(self) -> int:
        self._done_s = numpy.vstack((self._done_s, numpy.full(DRAWS, numpy.inf)))
        return len(self._done_s) - 1

    def _set_left(self, slots: Ints, draws: Ints, at_s: Floats, left: float) -> None:
        """A job begins (``left`` is 1) or ends (0) at ``at_s`` in one slot of each of ``draws``."""
        if not draws.size:
            return
        inferer = self._inferer[slots]
        here = (self._slots_of[inferer].T, draws)
        done = (at_s - self._since_s[here]) / self._durations_s(inferer, here)
        # What ends in the same moment ends next.
        self._left[here] = numpy.where(
            self._left[here] > 0, numpy.maximum(self._left[here] - done, LEAST), 0.0
        )
        self._left[slots, draws] = left
        self._since_s[here] = at_s
        change = 1 if left else -1
        self._jobs[inferer, draws] += change
        self._free[draws] -= change
        end_s = at_s + self._left[here] * self._durations_s(inferer, here)
        self._end_s[here] = numpy.where(self._left[here] > 0, end_s, numpy.inf)

    def _durations_s(self, inferer: Ints, here: tuple[Ints, Ints]) -> Floats:
        """How long each job ``here``, in these slots of an inferer and draws, takes as a whole
        while as many run there as do."""
        jobs = numpy.maximum(self._jobs[inferer, here[1]], 1)
        answers_s = self._slowdown[inferer, jobs - 1] * self._answer_s[here]
        durations_s: Floats = numpy.maximum(jobs * self._prompt_s[here] + answers_s, LEAST)
        return durations_s

    def _remaining_s(
        self, slot: int, attempt: RunningAttempt, jobs: int, now: datetime
    ) -> tuple[Floats, Floats]:
        """What is left of an attempt that runs beside others, ``jobs`` in all: the seconds that its
        prompt and its answer would take alone, in each draw."""
        work = attempt.work or self._service_time.typical_work()
        elapsed_s = attempt.elapsed_s(now)
        token_s = self._token_s[slot]
        prompt_s = self._service_time.prompt_tokens(work.prompt_bytes) * self._prompt_token_s[slot]
        slowdown = self._slowdown[self._inferer[slot], jobs - 1]
        so_far = max(attempt.tokens, int((elapsed_s - jobs * prompt_s) / (slowdown * token_s)), 0)
        so_far = min(so_far, work.most_tokens - 1)
        # What it has done would have taken less time alone.
        alone_s = prompt_s + so_far * token_s
        shared_s = jobs * prompt_s + so_far * slowdown * token_s
        done_s = elapsed_s * alone_s / max(shared_s, LEAST)
        residuals = self._sample_residuals()
        lengths = self._sample_lengths(work, beyond=so_far)
        left_s = (prompt_s + lengths * token_s) * residuals - done_s
        prompt_left_s = max(prompt_s - done_s, 0.0)
        # At least the token that is being computed.
        return numpy.full(DRAWS, prompt_left_s), numpy.maximum(left_s - prompt_left_s, token_s)

    def _sample_lengths(self, work: Work, beyond: int) -> Floats:
        """Tokens of all answers together, of which there are ``beyond``, in each draw."""
        lengths = self._service_time.lengths
        if work.n == 1:
            return lengths.sample(work, beyond, self._uniform())
        answers = [lengths.sample(work, 0, self._uniform()) for _ in range(work.n)]
        totals = numpy.sum(answers, axis=0)
        longer = totals[totals > beyond]
        # Where none is longer, the last answer is.
        return self._random.choice(longer, DRAWS) if longer.size else beyond + answers[-1]

    def _uniform(self) -> Floats:
        return 1 - self._random.random(DRAWS)  # never 0

    def _sample_residuals(self) -> Floats:
        return self._common * self._service_time.sample_residuals(self._random, DRAWS) ** HALF


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


def _slowdowns(reported: Sequence[float], most: int) -> list[float]:
    """For 1 to ``most`` jobs at once. An inferer reports as many as it has slots; one of an earlier
    version reports none."""
    known = [*reported[:most]] or [1.0]
    return known + [known[-1]] * (most - len(known))
