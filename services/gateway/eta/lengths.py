"""How long answers of a model get: learned from those that ended, and from those that were cut."""

import math
from collections import deque

import numpy
from numpy.typing import NDArray

from shared.wire.requests import Work

REMEMBERED = 400
LESSONS_A_CURVE = 10
"""A curve is drawn anew after so many lessons; while there are few, after each."""

FAR_IN_MAX_TOKENS, FAR_IN_PROMPT, OTHER_FORM = 5.0, 1.0, 0.05
"""How fast an answer counts less whose request asked for more or fewer tokens, had a longer or
shorter prompt (for each doubling, in powers of e), or was no chat where the other is one."""

Floats = NDArray[numpy.float64]
Curve = tuple[Floats, Floats]


class Lengths:
    """The distribution of natural lengths, in tokens.

    An answer that was cut off at its ``max_tokens`` says only that it would have become at least
    that long: the estimator is that of Kaplan and Meier, who made it for such cases. Each answer
    counts the more, the more its request was like the one in question: the same part of a program
    asks the same kind of question with the same ``max_tokens``.
    """

    def __init__(self) -> None:
        self._answers: deque[tuple[int, bool, float, float, bool]] = deque(maxlen=REMEMBERED)
        self._lessons = 0
        self._curves: dict[tuple[float, float, bool], Curve] = {}

    def learn(self, work: Work, completion_tokens: int, was_cut: bool) -> None:
        self._answers.append((completion_tokens, was_cut, *_kind(work)))
        self._lessons += 1
        if self._lessons % max(1, min(LESSONS_A_CURVE, len(self._answers) // 10)) == 0:
            self._curves.clear()

    def sample(self, work: Work, beyond: int, uniform: Floats) -> Floats:
        """Lengths of an answer that has ``beyond`` tokens already, one for each number in
        ``uniform`` (0 to 1), at most ``max_tokens``."""
        kind = _kind(work)
        if kind not in self._curves:
            self._curves[kind] = self._curve(*kind)
        ends, survival = self._curves[kind]
        at = int(numpy.searchsorted(ends, beyond, side="right"))
        left = survival[at - 1] if at else 1.0
        # The first end at which no more than this share of all answers is left.
        found = at + numpy.searchsorted(-survival[at:], -uniform * left)
        natural = numpy.append(ends, numpy.inf)[found]
        lengths: Floats = numpy.minimum(natural, work.max_tokens)
        return lengths

    def _curve(self, max_tokens: float, prompt: float, chat: bool) -> Curve:
        """At which lengths answers ended by themselves, and the share that went on from there."""
        if not self._answers:
            return numpy.empty(0), numpy.empty(0)
        # Of the same length those first that ended: the others went on.
        tokens, cut, their_max, their_prompt, their_form = numpy.array(sorted(self._answers)).T
        weights = numpy.exp(
            -FAR_IN_MAX_TOKENS * abs(their_max - max_tokens)
            - FAR_IN_PROMPT * abs(their_prompt - prompt)
        ) * numpy.where(their_form == chat, 1, OTHER_FORM)
        at_risk = weights[::-1].cumsum()[::-1]
        survival = numpy.cumprod(1 - numpy.where(cut, 0, weights / at_risk))
        return tokens[cut == 0], survival[cut == 0]


def _kind(work: Work) -> tuple[float, float, bool]:
    """The logarithms of ``max_tokens`` and, roughly, of the prompt's length; and the form."""
    return math.log2(work.max_tokens), round(math.log2(work.prompt_bytes + 1)), work.chat
