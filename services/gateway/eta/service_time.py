"""How fast the inferers of one model are, and how much work a request is: learned from results."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from statistics import median_low

import numpy

from services.gateway.eta.lengths import Floats, Lengths
from shared.job_ids import LONGEST_JOB
from shared.wire.requests import Work
from shared.wire.results import Completed, Timings

REMEMBERED = 200
LEAST_SPREAD = 0.03
"""No job takes exactly as long as the last one like it."""

RECENT = 9
"""The speed of an inferer is the median of so many jobs: what one absurd one says, of a machine
that was stopped in the middle of it, changes nothing."""
ENOUGH = 3
"""With fewer jobs of its own, the latest of other inferers make up the number."""

LARGEST_ERROR = log(4)
NO_ERRORS = (0.0, 0.0, 0.0)
"""What is assumed of jobs before there were any, so that the first error is not the only one."""

LARGEST_PROMPT = 64 * 1024 * 1024
"""Bytes: what the largest message of a broker holds."""
MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Speed:
    """Seconds a token."""

    prompt_s: float
    token_s: float


class Pace:
    """What the results of one model have taught."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        self._speeds: dict[str, deque[Speed]] = {}
        self._latest: deque[Speed] = deque(maxlen=RECENT)
        self._prompts: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._works: deque[Work] = deque(maxlen=REMEMBERED)
        self._errors: deque[float] = deque(NO_ERRORS, maxlen=REMEMBERED)
        # Made of the above when they are asked for, until the next lesson.
        self._line: tuple[float, float] | None = None
        self._errors_known: Floats | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._latest)

    def learn(self, result: Completed) -> None:
        """Take one more result into account; one without timings or sizes, or with some that
        cannot be, teaches nothing."""
        timings, usage, inferer, work = result.timings, result.usage, result.inferer, result.work
        if timings is None or inferer is None or work is None:
            return
        prompt_s, took_s = timings.prompt_ms / 1000, _took_s(timings)
        if not (
            0 <= prompt_s < took_s <= LONGEST_JOB.total_seconds()
            and 0 <= usage.prompt_tokens <= MOST_TOKENS
            and 0 <= usage.completion_tokens <= MOST_TOKENS
            and 0 <= work.prompt_bytes <= LARGEST_PROMPT
            and 0 < work.max_tokens <= MOST_TOKENS
        ):
            return
        if inferer in self._speeds:
            speed = self.speed(inferer)
            expected_s = (
                usage.prompt_tokens * speed.prompt_s + usage.completion_tokens * speed.token_s
            )
            if expected_s > 0:
                error = log(took_s / expected_s)
                self._errors.append(min(max(error, -LARGEST_ERROR), LARGEST_ERROR))
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
            speeds = self._speeds.pop(inferer, deque(maxlen=RECENT))
            self._speeds[inferer] = speeds
            while len(self._speeds) > REMEMBERED:  # names come and go with containers
                del self._speeds[next(iter(self._speeds))]
            speeds.append(latest)
            self._latest.append(latest)

    def speed(self, inferer: str) -> Speed:
        """This inferer's, or that of the others as long as little is known of it."""
        assert self.is_known, "nothing has been measured"
        known = list(self._speeds.get(inferer, ()))
        if len(known) < ENOUGH:
            others = [speed for speed in self._latest if speed not in known]
            known += others[len(known) - ENOUGH :]
        return Speed(
            median_low(speed.prompt_s for speed in known),
            median_low(speed.token_s for speed in known),
        )

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
            self._errors_known = numpy.array(self._errors)
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


def _took_s(timings: Timings) -> float:
    """How long the attempt ran. Inferers of earlier versions do not say it as a whole; what their
    clock showed at its beginning and its end is not used, since clocks are set and machines sleep.
    """
    if timings.total_ms is not None:
        return timings.total_ms / 1000
    return (timings.prompt_ms + timings.generation_ms) / 1000
