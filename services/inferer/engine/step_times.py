"""How long the model takes for one more token of each of several sequences."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from statistics import median

RECENT = 8
"""Steps of each number of sequences that are kept."""
ENOUGH = 4
"""Steps before their median counts: the first after a change may be slow."""
TYPICAL_GROWTH = 0.5
"""The exponent with which the time of a step grows with its sequences, where nothing is measured:
on two cores about this for 2 to 8."""
MOST = 1000.0
"""The largest slowdown: the machine has done something else meanwhile."""
REFRESH_S = 60.0
"""In which `ENOUGH` steps keep a measurement up to date."""
FORGET_S = 600.0
"""How long a measurement counts: the machine may have had other work then."""


class StepTimes:
    """The medians of recent steps by the number of sequences. Written by the compute thread, read
    by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: defaultdict[int, deque[tuple[float, float]]] = defaultdict(_recent)
        """When they were observed, and their seconds."""
        self._measured: dict[int, list[tuple[float, float]]] = {}
        """The last ones that were enough for a median. It is computed when it is asked for: with
        one sequence at a time, not in each step."""

    def observe(self, sequences: int, seconds: float) -> None:
        """Learn from a step that computed one token of each of ``sequences``."""
        now = self._clock()
        steps = self._steps[sequences]
        while steps and now - steps[0][0] > FORGET_S:
            steps.popleft()
        steps.append((now, seconds))
        if len(steps) >= ENOUGH:
            self._measured[sequences] = [*steps]

    def is_due(self, sequences: int) -> bool:
        """Whether steps with so many have been rare lately."""
        steps = self._steps[sequences]
        return len(steps) < ENOUGH or steps[-ENOUGH][0] < self._clock() - REFRESH_S

    def slowdown(self, sequences: int) -> float:
        """How many times as long a step with so many takes as one with a single sequence."""
        alone_s = self.estimate(1)
        if not alone_s:
            return float(sequences**TYPICAL_GROWTH)
        return min(max(1.0, self.estimate(sequences) / alone_s), MOST)

    def slowdowns(self, most: int, per_batch: int | None = None) -> list[float]:
        """How many times as long as alone a token takes on average while 1, 2, … ``most`` sequences
        generate, of which a step computes ``per_batch`` at most."""
        counts = range(1, most + 1)
        in_batch = [min(count, per_batch or count) for count in counts]
        return [
            self.slowdown(computed) * count / computed
            for count, computed in zip(counts, in_batch, strict=True)
        ]

    def estimate(self, sequences: int) -> float:
        """Seconds of a step, in between and beyond what was measured, too; 0 before the first."""
        if (step_s := self._lately(sequences)) is not None:
            return step_s
        measured = self.seconds
        below = max((n for n in measured if n < sequences), default=None)
        above = min((n for n in measured if n > sequences), default=None)
        if below is not None and above is not None:
            share = (sequences - below) / (above - below)
            return measured[below] + share * (measured[above] - measured[below])
        nearest = below or above
        if nearest is None:
            return 0.0
        return float(measured[nearest] * (sequences / nearest) ** TYPICAL_GROWTH)

    @property
    def seconds(self) -> Mapping[int, float]:
        """Seconds of a step by the number of sequences, where it was measured lately."""
        # Over a copy: it is made in one go, whatever the compute thread does.
        measured = ((sequences, self._lately(sequences)) for sequences in [*self._measured])
        return {sequences: step_s for sequences, step_s in measured if step_s is not None}

    def _lately(self, sequences: int) -> float | None:
        """Seconds of a step with so many, if they were measured lately."""
        steps = self._measured.get(sequences)
        if steps is None or steps[-1][0] < self._clock() - FORGET_S:
            return None
        return median([seconds for _, seconds in steps])


def _recent() -> deque[tuple[float, float]]:
    return deque(maxlen=RECENT)
