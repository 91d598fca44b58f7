"""How many jobs of each priority come per second, from those that came lately."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

MOST = 64
"""Jobs of a priority that are looked at."""
LEAST_SPAN_S = 10.0
"""They count as if they had come over so long at least."""
PARTS = 8
"""Of that time. The one in which most jobs came counts like the second: jobs that come at once, as
from a script, are not a rate. Of jobs that come at random, a few percent are lost in this way."""

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
        now = self._clock()
        part_s = max(now - came[0], LEAST_SPAN_S) / PARTS
        of_part = Counter(min(int((now - one) / part_s), PARTS - 1) for one in came)
        most, second = (*sorted(of_part.values(), reverse=True), 0)[:2]
        return (len(came) - most + second) / (part_s * PARTS)
