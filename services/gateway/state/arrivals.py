"""How many jobs of each priority come per second, from those that came lately."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy
from numpy.typing import NDArray

LEAST_SPAN_S = 20.0
"""Jobs count as if they had come over so long at least."""
USUAL, MOST = 64, 1024
"""Jobs of a priority that are looked at: the last 64, or all that came within `LEAST_SPAN_S` if
those are more. So at most 51 per second are counted."""
PARTS = 8
"""The fullest eighth of the time counts only as much as the second fullest: jobs that come at once,
as from a script, are not a rate. Of 64 jobs that come at random, 4 % are lost in this way, and 15 %
of eight."""

Floats = NDArray[numpy.float64]
Queue = tuple[str, str]
"""The token of a model, and a priority."""


class Arrivals:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: dict[Queue, deque[float]] = {}

    def note(self, queue: Queue) -> None:
        """A job has come."""
        self._at.setdefault(queue, deque(maxlen=MOST)).append(self._clock())

    def per_s(self, model: str, priorities: Iterable[str]) -> float:
        """Jobs of all ``priorities`` together."""
        return sum(self._rate(self._at.get((model, priority), ())) for priority in priorities)

    def _rate(self, at: Sequence[float]) -> float:
        came, now = numpy.array(at), self._clock()
        came = came[min(int(came.searchsorted(now - LEAST_SPAN_S)), max(came.size - USUAL, 0)) :]
        if not came.size:
            return 0.0
        span_s = max(now - float(came[0]), LEAST_SPAN_S)
        # The first only begins the time in which the others came.
        _, others = _without_fullest(came[1:], span_s / PARTS)
        second, _ = _without_fullest(others, span_s / PARTS)
        return (others.size + second) / span_s


def _without_fullest(came: Floats, part_s: float) -> tuple[int, Floats]:
    """How many jobs came in the part of that length in which most came, and when the others did."""
    if not came.size:
        return 0, came
    counts = came.searchsorted(came + part_s, side="right") - numpy.arange(came.size)
    first = int(counts.argmax())
    most = int(counts[first])
    return most, numpy.delete(came, slice(first, first + most))
