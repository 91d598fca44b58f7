"""How fast this inferer has been lately."""

from services.inferer.engine import Generation

WEIGHT_OF_LATEST = 0.3


class Speed:
    """Moving averages over the last jobs, in tokens per second; None before the first."""

    def __init__(self) -> None:
        self.prompt: float | None = None
        self.generation: float | None = None

    def learn(self, generation: Generation) -> None:
        """Take one more job into account; one of a single token has no generation to measure."""
        self.prompt = _blend(self.prompt, generation.prompt_tokens, generation.prompt_ms)
        self.generation = _blend(
            self.generation, generation.completion_tokens - 1, generation.generation_ms
        )


def _blend(average: float | None, tokens: int, ms: float) -> float | None:
    if tokens <= 0 or ms <= 0:
        return average
    latest = 1000 * tokens / ms
    if average is None:
        return latest
    return average + WEIGHT_OF_LATEST * (latest - average)
