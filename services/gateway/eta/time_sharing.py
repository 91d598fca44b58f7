"""How the jobs that run at once on one inferer share its time."""

import numpy
from numpy.typing import NDArray

from services.gateway.eta.lengths import Floats
from shared.prompts_first import PROMPTS_FIRST_S

LEAST_S = 1e-9
"""Left of every job that has not ended. Less of a prompt is a rounding error."""

Ints = NDArray[numpy.int64]
Index = tuple[Ints, Ints]
"""Of inferers or slots, and of draws."""


class TimeSharing:
    """Jobs in slots of inferers, in many draws at once. When a job begins or ends, the ends of the
    others on the same inferer change.

    The rules are those of the inferer's scheduler. Prompts come first, in the order in which they
    would be done if each were computed alone, while the answers wait. Once answers have waited
    `PROMPTS_FIRST_S`, prompts and answers get half of the time each. A token takes as many times as
    long as the inferer reports for the number of jobs that generate.

    A slot is addressed by its index and that of the draw. Times are seconds from now.
    """

    def __init__(self, inferer: Ints, slowdown: Floats, draws: int) -> None:
        """``inferer`` is the index of each slot's inferer. ``slowdown`` says how many times as long
        a token takes beside 0, 1, … others, a row for each inferer."""
        self._inferer = inferer
        self._slowdown = slowdown
        sizes = numpy.bincount(inferer)
        self._most = int(sizes.max())
        # One row more than there are slots, which stays free, stands for the missing slots of
        # smaller inferers.
        self._slots_of = numpy.full((sizes.size, self._most), inferer.size)
        for number, size in enumerate(sizes):
            self._slots_of[number, :size] = numpy.flatnonzero(inferer == number)

        per_inferer = (sizes.size, draws)
        self._since_s = numpy.zeros(per_inferer)
        """The time of which all these numbers are."""
        self._jobs = numpy.zeros(per_inferer, dtype=int)
        """How many it runs."""
        self._prompts_s = numpy.zeros(per_inferer)
        """What is left of all their prompts."""
        self._unopposed_s = numpy.zeros(per_inferer)
        """How much of that comes before any of the jobs could generate."""
        self._first_s = numpy.zeros(per_inferer)
        """How much of it comes before all answers."""
        self._credit_s = numpy.full(per_inferer, PROMPTS_FIRST_S)
        """How long prompts may make answers wait."""
        self._computed_s = numpy.zeros(per_inferer)
        """How much of prompts was computed so far."""

        shape = (inferer.size + 1, draws)
        self._prompt_s = numpy.zeros(shape)
        """What is left of the prompt in each slot and of those that come before it."""
        self._due_s = numpy.zeros(shape)
        """How much of all prompts will have been computed when its own is done, if no other is
        computed until then."""
        self._answer_s = numpy.zeros(shape)
        """What is left of its answer, in seconds that it takes alone; 0 if the slot is free."""
        self._end_s = numpy.full(shape, numpy.inf)

    @property
    def end_s(self) -> Floats:
        """When the job in each slot ends if no other begins or ends; infinite if the slot is
        free."""
        return self._end_s[:-1]

    @property
    def first_end_s(self) -> Floats:
        """When a job ends next on the inferer of each slot."""
        ends_s: Floats = self._end_s[self._slots_of].min(axis=1)[self._inferer]
        return ends_s

    @property
    def emptiest(self) -> Ints:
        """In each draw, a free slot of an inferer with the fewest jobs, if any slot is free."""
        jobs = numpy.where(self._answer_s[:-1] > 0, self._most + 1, self._jobs[self._inferer])
        slots: Ints = jobs.argmin(axis=0)
        return slots

    def resume(self, slots: Ints, prompt_s: Floats, answer_s: Floats) -> None:
        """Jobs run in ``slots`` already, before any begins. What is left of their prompts and
        answers would take so long alone: a row for each of them. To begin 64 on one inferer one by
        one would hold the event loop for 0.1 s."""
        self._answer_s[slots] = numpy.maximum(answer_s, LEAST_S)
        if self._most == 1:
            self._end_s[slots] = prompt_s + self._answer_s[slots]
            return
        self._prompt_s[slots] = self._due_s[slots] = prompt_s
        prompts_s = self._prompt_s[self._slots_of]
        order = prompts_s.argsort(axis=1, kind="stable")
        until_s = numpy.take_along_axis(prompts_s, order, axis=1).cumsum(axis=1)
        numpy.put_along_axis(prompts_s, order, until_s, axis=1)
        self._prompt_s[self._slots_of] = prompts_s
        self._prompts_s = until_s[:, -1]
        self._jobs = (self._answer_s[self._slots_of] > 0).sum(axis=1)
        every, draws = numpy.indices(self._jobs.shape).reshape(2, -1)
        self._predict((every, draws), (self._slots_of[every].T, draws))

    def begin(
        self, slots: Ints, draws: Ints, at_s: Floats, prompt_s: Floats, answer_s: Floats
    ) -> None:
        """A job begins in one slot of each of ``draws``, in place of the one that has just ended
        there, if any. Its prompt and its answer would take so long alone."""
        answer_s = numpy.maximum(answer_s, LEAST_S)
        if self._most == 1:
            self._answer_s[slots, draws] = answer_s
            self._end_s[slots, draws] = at_s + prompt_s + answer_s
            return
        inferer, here = self._advance(slots, draws, at_s)
        self._jobs[inferer] += self._answer_s[slots, draws] == 0
        due_s = self._computed_s[inferer] + prompt_s
        others_s = self._prompt_s[here]
        is_before = self._due_s[here] <= due_s
        delay_s = numpy.where(is_before | (others_s == 0), 0.0, prompt_s)
        self._prompt_s[here] = others_s + delay_s
        self._prompt_s[slots, draws] = numpy.where(is_before, others_s, 0.0).max(axis=0) + prompt_s
        self._due_s[slots, draws] = due_s
        self._prompts_s[inferer] += prompt_s
        self._answer_s[slots, draws] = answer_s
        self._predict(inferer, here)

    def end(self, slots: Ints, draws: Ints) -> None:
        """The job in one slot of each of ``draws`` ends, at its time."""
        if self._most == 1:
            self._answer_s[slots, draws] = 0.0
            self._end_s[slots, draws] = numpy.inf
            return
        inferer, here = self._advance(slots, draws, self._end_s[slots, draws])
        self._jobs[inferer] -= 1
        self._answer_s[slots, draws] = 0.0
        self._predict(inferer, here)

    def skip(self, seconds: Floats) -> None:
        """Let time pass in which all jobs stand still."""
        self._since_s += seconds
        self._end_s += seconds

    def _advance(self, slots: Ints, draws: Ints, at_s: Floats) -> tuple[Index, Index]:
        """Note what the inferers of ``slots`` have done by ``at_s``. Returns the indices of these
        inferers, and those of their slots."""
        inferer = (self._inferer[slots], draws)
        here = (self._slots_of[inferer[0]].T, draws)
        passed_s = numpy.maximum(at_s - self._since_s[inferer], 0.0)
        first_s = self._first_s[inferer]
        shared_s = self._prompts_s[inferer] - first_s
        first_done_s = numpy.minimum(passed_s, first_s)
        after_s = passed_s - first_done_s
        shared_done_s = numpy.minimum(after_s / 2, shared_s)
        done_s = first_done_s + shared_done_s

        prompt_s, answer_s = self._prompt_s[here], self._answer_s[here]
        own_s = numpy.maximum(prompt_s - first_s, 0.0)
        generating_s = numpy.maximum(after_s - 2 * own_s, 0.0)
        beside_s = numpy.minimum(generating_s / 2, shared_s - own_s)
        beside, after = self._slowdowns(inferer, here)
        left_s = answer_s - beside_s / beside - (generating_s - 2 * beside_s) / after
        self._answer_s[here] = numpy.where(answer_s > 0, numpy.maximum(left_s, LEAST_S), 0.0)
        prompt_s = prompt_s - done_s
        self._prompt_s[here] = numpy.where(prompt_s > LEAST_S, prompt_s, 0.0)

        opposed_s = numpy.maximum(first_done_s - self._unopposed_s[inferer], 0.0)
        credit_s = self._credit_s[inferer] - opposed_s + after_s - 2 * shared_done_s
        self._credit_s[inferer] = numpy.minimum(credit_s, PROMPTS_FIRST_S)
        self._prompts_s[inferer] -= done_s
        self._computed_s[inferer] += done_s
        self._since_s[inferer] += passed_s
        return inferer, here

    def _predict(self, inferer: Index, here: Index) -> None:
        """Compute when the jobs ``here`` end, in these slots of ``inferer`` and draws."""
        prompt_s, answer_s = self._prompt_s[here], self._answer_s[here]
        prompts_s = self._prompts_s[inferer]
        unopposed_s = numpy.where(answer_s > LEAST_S, prompt_s, numpy.inf).min(axis=0)
        first_s = numpy.minimum(prompts_s, unopposed_s + self._credit_s[inferer])
        self._unopposed_s[inferer], self._first_s[inferer] = unopposed_s, first_s

        own_s = numpy.maximum(prompt_s - first_s, 0.0)
        # A job without an answer ends with its prompt.
        waits_s = numpy.where(answer_s > LEAST_S, first_s, numpy.minimum(prompt_s, first_s))
        beside, after = self._slowdowns(inferer, here)
        beside_s = numpy.minimum(answer_s * beside, prompts_s - first_s - own_s)
        after_s = (answer_s - beside_s / beside) * after
        end_s = self._since_s[inferer] + waits_s + 2 * (own_s + beside_s) + after_s
        self._end_s[here] = numpy.where(answer_s > 0, end_s, numpy.inf)

    def _slowdowns(self, inferer: Index, here: Index) -> tuple[Floats, Floats]:
        """How many times as long a token takes beside prompts, when only those generate that do
        now, and after them."""
        generate = (self._answer_s[here] > LEAST_S) & (self._prompt_s[here] == 0)
        beside, after = (
            self._slowdown[inferer[0], numpy.maximum(jobs, 1) - 1]
            for jobs in (generate.sum(axis=0), self._jobs[inferer])
        )
        return beside, after
