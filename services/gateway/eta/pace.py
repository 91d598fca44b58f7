"""How fast the inferers of one model are, and how much work a request is: learned from results."""

from collections import deque
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
        took_s = milliseconds_between(result.started_at, result.finished_at) / 1000
        if (speed := self._speeds.get(inferer)) is not None:
            expected_s = (
                usage.prompt_tokens * speed.prompt_s + usage.completion_tokens * speed.token_s
            )
            if expected_s > 0 and took_s > 0:
                self._errors.append(float(numpy.log(took_s / expected_s)))
        self._works.append(work)
        self._prompts.append((work.prompt_bytes, usage.prompt_tokens))
        self.lengths.learn(work, usage.completion_tokens, result.finish_reason == "length")
        if usage.prompt_tokens > 0:
            latest = Speed(
                timings.prompt_ms / 1000 / usage.prompt_tokens,
                # The whole rest of the job, so that what else a job takes is in it.
                (took_s - timings.prompt_ms / 1000) / max(usage.completion_tokens, 1),
            )
            self._speeds[inferer] = _blend(speed, latest)
            self._usual = _blend(self._usual, latest)

    def speed(self, inferer: str) -> Speed:
        """This inferer's, or that of the others as long as nothing is known of it."""
        speed = self._speeds.get(inferer, self._usual)
        assert speed is not None, "nothing has been measured"
        return speed

    def forget_inferers(self, live: set[str]) -> None:
        """Keep only those that are ``live``: names come and go with containers."""
        self._speeds = {name: speed for name, speed in self._speeds.items() if name in live}

    def prompt_tokens(self, prompt_bytes: int) -> float:
        """How many tokens so long a prompt will have."""
        seen_bytes, seen_tokens = numpy.array(self._prompts, dtype=float).T
        spread = seen_bytes - seen_bytes.mean()
        if not spread.any():
            return float(prompt_bytes * seen_tokens.sum() / max(seen_bytes.sum(), 1))
        slope = float((spread * seen_tokens).sum() / (spread**2).sum())
        guess = seen_tokens.mean() + slope * (prompt_bytes - seen_bytes.mean())
        return float(max(guess, 1))

    def usual_work(self) -> Work:
        """A request like those of late, where nothing is known but that there is one."""
        return Work(
            prompt_bytes=int(numpy.mean([work.prompt_bytes for work in self._works])),
            max_tokens=int(numpy.median([work.max_tokens for work in self._works])),
            chat=self._works[-1].chat,
        )

    def luck(self, random: numpy.random.Generator, draws: int) -> Floats:
        """Factors by which jobs have lately taken longer than was expected of their tokens."""
        errors = numpy.array(self._errors) if self._errors else numpy.zeros(1)
        noise = random.normal(0, LEAST_SPREAD, draws)
        return numpy.exp(random.choice(errors, draws) + noise)


def _blend(average: Speed | None, latest: Speed) -> Speed:
    if average is None:
        return latest
    return Speed(
        average.prompt_s + WEIGHT_OF_LATEST * (latest.prompt_s - average.prompt_s),
        average.token_s + WEIGHT_OF_LATEST * (latest.token_s - average.token_s),
    )
