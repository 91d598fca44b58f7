"""How fast this inferer has been lately."""

from collections import deque
from statistics import median

from services.inferer.engine.generation import Generation

RECENT = 5
"""Jobs. One job during which the machine was suspended does not matter."""


class Speed:
    """Medians of the last jobs, in tokens per second; None before the first."""

    def __init__(self) -> None:
        self._prompts: deque[float] = deque(maxlen=RECENT)
        self._generations: deque[float] = deque(maxlen=RECENT)

    @property
    def prompt(self) -> float | None:
        return median(self._prompts) if self._prompts else None

    @property
    def generation(self) -> float | None:
        return median(self._generations) if self._generations else None

    def learn(self, generation: Generation) -> None:
        """Take one more job into account; one of a single token has no generation to measure, and
        of one whose prompt was cached the time goes to other things."""
        computed = generation.prompt_tokens - generation.cached_tokens
        if computed > generation.cached_tokens:
            _add(self._prompts, computed, generation.prompt_ms)
        _add(self._generations, generation.completion_tokens - 1, generation.generation_ms)


def _add(speeds: deque[float], tokens: int, ms: float) -> None:
    if tokens > 0 and ms > 0:
        speeds.append(1000 * tokens / ms)
