"""How fast the inferers of one model are, and how much work a request is: learned from results."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy

from services.gateway.eta.lengths import Floats, Lengths
from shared.messages import Completed, Work
from shared.timestamps import milliseconds_between

REMEMBERED = 200
WEIGHT_OF_LATEST = 0.25
LEAST_SPREAD = 0.03
"""No job takes exactly as long as the last one like it."""


@dataclass
class Speed:
    """Seconds a token."""

    prompt_s: float
    token_s: float


class Pace:
    """What the results of one model have taught."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        self._speeds: dict[str, Speed] = {}
        self._usual: Speed | None = None
        self._prompts: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._works: deque[Work] = deque(maxlen=REMEMBERED)
        self._errors: deque[float] = deque(maxlen=REMEMBERED)
        # Made of the above when they are asked for, until the next lesson.
        self._line: tuple[float, float] | None = None
        self._errors_known: Floats | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return self._usual is not None

    def learn(self, result: Completed) -> None:
        """Take one more result into account; one without timings or sizes teaches nothing."""
        timings, usage, inferer = result.timings, result.usage, result.inferer
        work = result.work
        if timings is None or inferer is None or result.started_at is None or work is None:
            return
        prompt_s = timings.prompt_ms / 1000
        took_s = milliseconds_between(result.started_at, result.finished_at) / 1000
        if took_s <= prompt_s:
            return  # a clock that was set meanwhile
        if (speed := self._speeds.get(inferer)) is not None:
            expected_s = (
                usage.prompt_tokens * speed.prompt_s + usage.completion_tokens * speed.token_s
            )
            if expected_s > 0:
                self._errors.append(float(numpy.log(took_s / expected_s)))
        self._line = self._errors_known = None
        self._works.append(work)
        self._prompts.append((work.prompt_bytes, usage.prompt_tokens))
        self.lengths.learn(work, usage.completion_tokens, result.finish_reason == "length")
        if usage.prompt_tokens > 0:
            latest = Speed(
                prompt_s / usage.prompt_tokens,
                # The whole rest of the job, so that what else a job takes is in it.
                (took_s - prompt_s) / max(usage.completion_tokens, 1),
            )
            self._speeds.pop(inferer, None)
            self._speeds[inferer] = _blend(speed, latest)
            while len(self._speeds) > REMEMBERED:  # names come and go with containers
                del self._speeds[next(iter(self._speeds))]
            self._usual = _blend(self._usual, latest)

    def speed(self, inferer: str) -> Speed:
        """This inferer's, or that of the others as long as nothing is known of it."""
        speed = self._speeds.get(inferer, self._usual)
        assert speed is not None, "nothing has been measured"
        return speed

    def prompt_tokens(self, prompt_bytes: int) -> float:
        """How many tokens so long a prompt will have."""
        if self._line is None:
            self._line = _fit(self._prompts)
        slope, intercept = self._line
        return max(intercept + slope * prompt_bytes, 1.0)

    def usual_work(self) -> Work:
        """A request like those of late, where nothing is known but that there is one."""
        return Work(
            prompt_bytes=int(numpy.mean([work.prompt_bytes for work in self._works])),
            max_tokens=int(numpy.median([work.max_tokens for work in self._works])),
            chat=self._works[-1].chat,
        )

    def luck(self, random: numpy.random.Generator, draws: int) -> Floats:
        """Factors by which jobs have lately taken longer than was expected of their tokens."""
        if self._errors_known is None:
            self._errors_known = numpy.array(self._errors or [0.0])
        which = random.integers(0, self._errors_known.size, draws)
        noise = random.normal(0, LEAST_SPREAD, draws)
        factors: Floats = numpy.exp(self._errors_known[which] + noise)
        return factors


def _fit(prompts: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Slope and intercept of tokens over bytes: least squares, through 0 when all are alike."""
    sizes, tokens = numpy.array(list(prompts), dtype=float).T
    spread = sizes - sizes.mean()
    if not spread.any():
        return float(tokens.sum() / max(sizes.sum(), 1)), 0.0
    slope = float((spread * tokens).sum() / (spread**2).sum())
    return slope, float(tokens.mean() - slope * sizes.mean())


def _blend(average: Speed | None, latest: Speed) -> Speed:
    if average is None:
        return latest
    return Speed(
        average.prompt_s + WEIGHT_OF_LATEST * (latest.prompt_s - average.prompt_s),
        average.token_s + WEIGHT_OF_LATEST * (latest.token_s - average.token_s),
    )
