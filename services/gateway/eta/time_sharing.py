"""How the jobs that run at once on one inferer share its time."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy
from numpy.typing import NDArray

from services.gateway.eta.lengths import Floats
from shared.prompts_first import PROMPTS_FIRST_S

LEAST_S = 1e-9
"""Left of every job that has not ended. Less of a prompt is a rounding error."""

Bools = NDArray[numpy.bool_]
Ints = NDArray[numpy.int64]

INFERER_ROWS, SLOT_ROWS = 6, 8
"""How many numbers describe an inferer, and a slot."""


def turn_factor(jobs: Ints | int, per_batch: Ints | int, rank: Ints | int) -> Floats:
    """How many times as long as the average a token takes of a job that began as number ``rank``
    (from 0) of so many ``jobs`` that generate. If there are more than a batch has, the oldest are
    in each batch, and the others take turns in its last place."""
    jobs = numpy.maximum(jobs, 1)
    batches = numpy.where(numpy.less(rank, per_batch - 1), 1, jobs - per_batch + 1)
    factors: Floats = numpy.where(jobs > per_batch, per_batch / jobs * batches, 1.0)
    return factors


class TimeSharing:
    """Jobs in slots of inferers, in many draws at once. When a job begins or ends, the ends of the
    others on the same inferer change.

    The rules are those of the inferer's scheduler. Prompts come first, in the order in which they
    would be done if each were computed alone, while the answers wait. Once answers have waited
    `PROMPTS_FIRST_S`, prompts and answers get half of the time each. (Where long prompts are
    computed in the background, answers end somewhat sooner than that.) A token takes as many times
    as long as the inferer reports for the number of jobs that generate, on average of these
    (`turn_factor`).

    A slot is addressed by its index and that of the draw. Times are seconds from now.
    """

    def __init__(self, inferer: Ints, slowdown: Floats, per_batch: Ints, draws: int) -> None:
        """``inferer`` is the index of each slot's inferer. ``slowdown`` says how many times as long
        a token takes beside 0, 1, … others, a row for each inferer; ``per_batch`` how many jobs
        each has in a batch that generate."""
        self._inferer = inferer
        self._per_batch = per_batch
        self._begun = 0
        """How many jobs have begun."""
        # By the number of jobs that generate; where none does, the next one is alone.
        self._slowdown = numpy.hstack((slowdown[:, :1], slowdown))
        self._draws = draws
        sizes = numpy.bincount(inferer)
        self._most = int(sizes.max())
        # One slot more than there are, which stays free, stands for the missing slots of smaller
        # inferers.
        self._slots_of = numpy.full((self._most, sizes.size), inferer.size)
        self._place = numpy.zeros(inferer.size, dtype=int)
        """Of each slot among those of its inferer."""
        for number, size in enumerate(sizes):
            slots = numpy.flatnonzero(inferer == number)
            self._slots_of[:size, number] = slots
            self._place[slots] = range(size)
        self._all = _Inferers(
            numpy.zeros((INFERER_ROWS, sizes.size, draws)),
            numpy.full((SLOT_ROWS, inferer.size + 1, draws), numpy.inf),
        )
        self._all.credit_s[:] = PROMPTS_FIRST_S
        self._all.beside[:] = self._all.after[:] = 1.0
        self._only: _Inferers | None = None
        """A view of the same, if there is only one inferer."""
        if sizes.size == 1:
            self._only = _Inferers(self._all.of_inferers[:, 0], self._all.of_slots[:, :-1])

    @property
    def end_s(self) -> Floats:
        """When the job in each slot ends if no other begins or ends; infinite if the slot is
        free."""
        return self._all.end_s[:-1]

    @property
    def first_end_s(self) -> Floats:
        """When a job ends next on the inferer of each slot."""
        ends_s: Floats = self._all.end_s[self._slots_of].min(axis=0)[self._inferer]
        return ends_s

    @property
    def emptiest(self) -> Ints:
        """In each draw, a free slot of an inferer with the fewest jobs, if any slot is free."""
        is_free = numpy.isinf(self._all.answer_s[:-1])
        slots: Ints = numpy.where(is_free, self._all.jobs[self._inferer], numpy.inf).argmin(axis=0)
        return slots

    def resume(self, slots: Ints, prompt_s: Floats, answer_s: Floats) -> None:
        """Jobs run in ``slots`` already, before any begins, in the order in which they began. What
        is left of their prompts and answers would take so long alone: a row for each of them. To
        begin hundreds one by one would hold the event loop for tens of milliseconds."""
        answer_s = numpy.maximum(answer_s, LEAST_S)
        self._all.answer_s[slots] = answer_s
        if self._most == 1:
            self._all.end_s[slots] = prompt_s + answer_s
            return
        self._all.prompt_s[slots] = self._all.due_s[slots] = prompt_s
        self._begun = slots.size
        self._all.began[slots] = numpy.arange(slots.size)[:, None]
        inferer, draws = numpy.indices(self._all.jobs.shape).reshape(2, -1)
        with self._inferers(inferer, draws) as inferers:
            inferers.resume()
            inferers.predict(self._slowdown[inferer], self._per_batch[inferer])

    def begin(
        self, slots: Ints, draws: Ints, at_s: Floats, prompt_s: Floats, answer_s: Floats
    ) -> None:
        """A job begins in one slot of each of ``draws``, in place of the one that has just ended
        there, if any. Its prompt and its answer would take so long alone."""
        answer_s = numpy.maximum(answer_s, LEAST_S)
        if self._most == 1:
            self._all.answer_s[slots, draws] = answer_s
            self._all.end_s[slots, draws] = at_s + prompt_s + answer_s
            return
        inferer = self._inferer[slots]
        with self._inferers(inferer, draws) as inferers:
            inferers.advance(at_s)
            inferers.begin(self._place[slots], self._begun, prompt_s, answer_s)
            inferers.predict(self._slowdown[inferer], self._per_batch[inferer])
        self._begun += 1

    def end(self, slots: Ints, draws: Ints) -> None:
        """The job in one slot of each of ``draws`` ends, at its time."""
        if self._most == 1:
            self._all.answer_s[slots, draws] = self._all.end_s[slots, draws] = numpy.inf
            return
        inferer = self._inferer[slots]
        with self._inferers(inferer, draws) as inferers:
            inferers.advance(self.end_s[slots, draws])
            inferers.end(self._place[slots])
            inferers.predict(self._slowdown[inferer], self._per_batch[inferer])

    def skip(self, seconds: Floats) -> None:
        """Let time pass in which all jobs stand still."""
        self._all.since_s += seconds
        self._all.end_s += seconds

    @contextmanager
    def _inferers(self, inferer: Ints, draws: Ints) -> Iterator["_Inferers"]:
        """One inferer in each of ``draws``, to be changed."""
        if self._only is not None and draws.size == self._draws:
            yield self._only  # without copying anything
            return
        # One flat index is several times as fast as an index for each axis.
        here = inferer * self._draws + draws
        slots = self._slots_of.take(inferer, axis=1) * self._draws + draws
        of_inferers = self._all.of_inferers.reshape(INFERER_ROWS, -1)
        of_slots = self._all.of_slots.reshape(SLOT_ROWS, -1)
        some = _Inferers(of_inferers.take(here, axis=1), of_slots.take(slots, axis=1))
        yield some
        of_inferers[:, here] = some.of_inferers
        for row, changed in zip(of_slots, some.of_slots, strict=True):
            row[slots] = changed


class _Inferers:
    """Inferers, each in one draw, and the jobs in their slots: in each array, a column for each of
    them. The arrays are views of two larger ones, which are copied faster."""

    since_s: Floats
    """The time of which all these numbers are."""
    jobs: Floats
    """How many it runs."""
    prompts_s: Floats
    """What is left of all their prompts."""
    unopposed_s: Floats
    """How much of that comes before any of the jobs could generate."""
    first_s: Floats
    """How much of it comes before all answers."""
    credit_s: Floats
    """How long prompts may make answers wait."""

    # Of each slot; most are infinite if it is free.
    began: Floats
    """How many jobs began before its own."""
    prompt_s: Floats
    """What is left of its prompt and of those that come before it."""
    due_s: Floats
    """How much of all prompts will have been computed when its own is done, if no other is computed
    until then."""
    answer_s: Floats
    """What is left of its answer, in seconds that it takes alone."""
    beside: Floats
    """How many times as long a token takes beside prompts, when only those generate that do now."""
    after: Floats
    """And after the prompts."""
    delay_s: Floats
    """How much of an answer could be generated beside prompts before its own prompt is done."""
    end_s: Floats
    """When its job ends if no other begins or ends."""

    def __init__(self, of_inferers: Floats, of_slots: Floats) -> None:
        self.of_inferers, self.of_slots = of_inferers, of_slots
        (
            self.since_s,
            self.jobs,
            self.prompts_s,
            self.unopposed_s,
            self.first_s,
            self.credit_s,
        ) = of_inferers
        (
            self.began,
            self.prompt_s,
            self.due_s,
            self.answer_s,
            self.beside,
            self.after,
            self.delay_s,
            self.end_s,
        ) = of_slots

    def resume(self) -> None:
        """Jobs run, each with only its own prompt so far."""
        self.jobs[:] = numpy.isfinite(self.answer_s).sum(axis=0)
        order = self.prompt_s.argsort(axis=0, kind="stable")
        until_s = numpy.take_along_axis(self.prompt_s, order, axis=0).cumsum(axis=0)
        numpy.put_along_axis(self.prompt_s, order, until_s, axis=0)
        self.prompts_s[:] = until_s.max(axis=0, where=numpy.isfinite(until_s), initial=0.0)

    def advance(self, at_s: Floats) -> None:
        """Note what was done until then."""
        passed_s = numpy.maximum(at_s - self.since_s, 0.0)
        after_s = numpy.maximum(passed_s - self.first_s, 0.0)
        first_s = passed_s - after_s
        shared_s = numpy.minimum(after_s / 2, self.prompts_s - self.first_s)
        alone_s = after_s - 2 * shared_s

        # Of an answer that has no prompt before it.
        answer_s = shared_s / self.beside + alone_s / self.after
        self.answer_s -= numpy.maximum(answer_s - self.delay_s, 0.0)
        numpy.maximum(self.answer_s, LEAST_S, out=self.answer_s)

        prompts_s = first_s + shared_s
        self.prompt_s -= prompts_s
        numpy.maximum(self.prompt_s, 0.0, out=self.prompt_s)
        self.due_s -= prompts_s
        self.prompts_s -= prompts_s
        opposed_s = numpy.maximum(first_s - self.unopposed_s, 0.0)
        self.credit_s += alone_s - opposed_s
        numpy.minimum(self.credit_s, PROMPTS_FIRST_S, out=self.credit_s)
        self.since_s += passed_s

    def begin(self, slots: Ints, number: int, prompt_s: Floats, answer_s: Floats) -> None:
        """A job begins in one of the slots of each, after so many others."""
        is_before = self.due_s <= prompt_s  # or done
        before_s = numpy.where(is_before, self.prompt_s, 0.0).max(axis=0)
        self.prompt_s += numpy.where(is_before, 0.0, prompt_s)
        self.prompts_s += prompt_s
        here = slots, numpy.arange(slots.size)
        self.jobs += numpy.isinf(self.answer_s[here])
        self.began[here] = number
        self.prompt_s[here] = before_s + prompt_s
        self.due_s[here] = prompt_s
        self.answer_s[here] = answer_s

    def end(self, slots: Ints) -> None:
        """A job ends in one of the slots of each."""
        self.jobs -= 1
        here = slots, numpy.arange(slots.size)
        self.prompt_s[here] = self.due_s[here] = self.answer_s[here] = numpy.inf

    def predict(self, slowdown: Floats, per_batch: Ints) -> None:
        """Compute when the jobs end. ``slowdown``: by the number of jobs, a row for each
        inferer."""
        has_answer = self.answer_s > LEAST_S
        self.unopposed_s[:] = numpy.where(has_answer, self.prompt_s, numpy.inf).min(axis=0)
        numpy.minimum(self.prompts_s, self.unopposed_s + self.credit_s, out=self.first_s)
        is_generating = has_answer & (self.prompt_s <= LEAST_S)
        self.beside[:] = self._token_times(is_generating, slowdown, per_batch)
        self.after[:] = self._token_times(numpy.isfinite(self.answer_s), slowdown, per_batch)

        # A job without an answer ends with its prompt.
        first_s = numpy.where(has_answer, self.first_s, numpy.minimum(self.prompt_s, self.first_s))
        numpy.divide(
            numpy.maximum(self.prompt_s - self.first_s, 0.0), self.beside, out=self.delay_s
        )
        # In seconds that it takes alone, like the answer.
        until_s = self.delay_s + self.answer_s
        beside_s = numpy.minimum(until_s, (self.prompts_s - self.first_s) / self.beside)
        self.end_s[:] = first_s + beside_s * (2 * self.beside - self.after) + until_s * self.after
        self.end_s += self.since_s

    def _token_times(self, is_generating: Bools, slowdown: Floats, per_batch: Ints) -> Floats:
        """How many times as long as alone a token of each slot's job takes while those generate."""
        jobs = is_generating.sum(axis=0)
        times: Floats = slowdown[numpy.arange(jobs.size), jobs]
        if (jobs <= per_batch).all():
            return times
        began = numpy.where(is_generating, self.began, numpy.inf)
        rank = began.argsort(axis=0, kind="stable").argsort(axis=0)
        return times * turn_factor(jobs, per_batch, rank)
