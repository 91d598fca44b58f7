"""How many jobs of each priority come per second, from those that came lately."""

import time
from collections import deque
from collections.abc import Callable, Iterable

MOST = 64
"""Jobs of a priority that are looked at."""
LEAST_SPAN_S = 60.0
"""Some jobs that come at once are not a rate: they count as if they had come over so long."""

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

    def _rate(self, at: Iterable[float]) -> float:
        came = list(at)
        if not came:
            return 0.0
        # The first only begins the time in which the others came.
        return (len(came) - 1) / max(self._clock() - came[0], LEAST_SPAN_S)
