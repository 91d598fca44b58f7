"""How fast prompts and answers are computed: of one generation, and lately."""

from collections import deque
from statistics import median

from msgspec import Struct

from services.inferer.engine.embedding_engine import Pooled
from services.inferer.engine.generation import Generation

RECENT = 5
"""Jobs. One job during which the machine was suspended does not matter."""


class MeasuredSpeed(Struct, frozen=True):
    """Tokens per second; None for what cannot be known from it."""

    prompt: float | None = None
    answer: float | None = None


def measured_speed(generation: Generation | Pooled) -> MeasuredSpeed:
    """One of a single token has no answer to measure; and where most of the prompt was cached, the
    time until the first token went to other things."""
    computed = generation.prompt_tokens - generation.cached_tokens
    return MeasuredSpeed(
        prompt=_per_second(computed, generation.prompt_ms)
        if computed > generation.cached_tokens
        else None,
        answer=_per_second(generation.completion_tokens - 1, generation.generation_ms),
    )


class Speed:
    """The medians of the last jobs; before the first, what the self-test measured."""

    def __init__(self, tested: MeasuredSpeed) -> None:
        self._tested = tested
        self._prompts: deque[float] = deque(maxlen=RECENT)
        self._answers: deque[float] = deque(maxlen=RECENT)

    @property
    def prompt(self) -> float | None:
        return median(self._prompts) if self._prompts else self._tested.prompt

    @property
    def answer(self) -> float | None:
        return median(self._answers) if self._answers else self._tested.answer

    def learn(self, generation: Generation | Pooled) -> None:
        """Take one more job into account."""
        speed = measured_speed(generation)
        if speed.prompt is not None:
            self._prompts.append(speed.prompt)
        if speed.answer is not None:
            self._answers.append(speed.answer)


def _per_second(tokens: int, ms: float) -> float | None:
    return 1000 * tokens / ms if tokens > 0 and ms > 0 else None
