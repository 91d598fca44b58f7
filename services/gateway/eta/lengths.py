"""The distribution of answer lengths of a model, learned from finished answers."""

import math
from collections import deque

import numpy
from numpy.typing import NDArray

from shared.wire.requests import Work

MAX_SAMPLES = 400
SAMPLES_PER_CURVE = 10
"""A curve is computed again after this many new samples; while there are few, after each."""

MAX_TOKENS_DECAY, PROMPT_DECAY, OTHER_TASK_WEIGHT = 5.0, 1.0, 0.05
"""How much less an answer counts that came from a different request: the exponents for each
doubling of ``max_tokens`` and of the prompt's length, and a factor if only one is a chat."""

Floats = NDArray[numpy.float64]

ASSUMED_MEAN = 200.0
"""Tokens of an answer before one was seen. The lengths of answers that nobody has seen are taken
for exponentially distributed: some have a few tokens, and some a thousand."""

FAIR_SHARE = 0.05
"""Of the weights of all answers: so much of them must be at least as long for a length to count as
seen."""

Curve = tuple[Floats, Floats, float, float]


class Lengths:
    """The distribution of natural answer lengths, in tokens.

    An answer that was cut off at its ``max_tokens`` is a censored sample: it would have been at
    least that long. So the estimator is that of Kaplan and Meier. Beyond the longest answer that
    was seen, the rest is taken for exponentially distributed. The more similar its request, the
    more an answer counts, because one part of a program tends to send the same kind of prompt with
    the same ``max_tokens``.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, bool, float, float, bool]] = deque(maxlen=MAX_SAMPLES)
        self._observed = 0
        self._curves: dict[tuple[float, float, bool], Curve] = {}

    def observe(self, work: Work, completion_tokens: int, was_cut: bool) -> None:
        """Add a sample; ``was_cut`` if the answer ended at its ``max_tokens``."""
        self._samples.append((completion_tokens, was_cut, *_features(work)))
        self._observed += 1
        if self._observed % max(1, min(SAMPLES_PER_CURVE, len(self._samples) // 10)) == 0:
            self._curves.clear()

    def sample(self, work: Work, beyond: int, uniform: Floats) -> Floats:
        """Lengths of an answer that already has ``beyond`` tokens, one for each number in
        ``uniform`` (more than 0, at most 1), at most ``max_tokens``."""
        features = _features(work)
        if features not in self._curves:
            self._curves[features] = self._curve(*features)
        ends, survival, longest, mean = self._curves[features]
        at = int(ends.searchsorted(beyond, side="right"))
        left = survival[at - 1] if at else 1.0
        # The first length at which no more than this share of all answers is left.
        found = at + (-survival[at:]).searchsorted(uniform * -left)
        natural = ends[found]
        # Nobody has seen the end of those that are longer than all others.
        is_unseen = found == len(survival)
        if is_unseen.any():
            unseen = survival[-1] if len(survival) else 1.0
            rest = -mean * numpy.log(uniform[is_unseen] * (left / unseen if unseen else 1.0))
            natural[is_unseen] = numpy.ceil(max(longest, beyond) + rest)
        lengths: Floats = numpy.minimum(natural, work.max_tokens)
        return lengths

    def _curve(self, max_tokens: float, prompt: float, chat: bool) -> Curve:
        """The lengths at which answers ended by themselves, and infinity; the share that was longer
        than each; the longest that was seen, and the mean of what is left of a longer one."""
        if not self._samples:
            return numpy.array([numpy.inf]), numpy.empty(0), 0.0, ASSUMED_MEAN
        # Sorted so that of equal lengths those that ended come before those that were cut.
        tokens, cut, their_max, their_prompt, their_chat = numpy.array(sorted(self._samples)).T
        weights = numpy.exp(
            -MAX_TOKENS_DECAY * abs(their_max - max_tokens)
            - PROMPT_DECAY * abs(their_prompt - prompt)
        ) * numpy.where(their_chat == chat, 1, OTHER_TASK_WEIGHT)
        at_risk = weights[::-1].cumsum()[::-1]
        survival = numpy.cumprod(1 - numpy.where(cut, 0, weights / at_risk))
        longest = tokens[at_risk >= FAIR_SHARE * at_risk[0]][-1]
        # As many tokens for each that ended, with one more of the assumed length.
        counts = weights / weights.max()
        mean = (ASSUMED_MEAN + (counts * tokens).sum()) / (1 + counts[cut == 0].sum())
        ends = numpy.append(tokens[cut == 0], numpy.inf)
        return ends, survival[cut == 0], longest, mean


def _features(work: Work) -> tuple[float, float, bool]:
    """log2 of ``max_tokens``, log2 of the prompt's length (rounded), and whether it is a chat."""
    return math.log2(work.max_tokens), round(math.log2(work.prompt_bytes + 1)), work.task == "chat"
