"""How long the inferers of one model take for a request, learned from finished results."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from statistics import median_low

import numpy

from services.gateway.eta.lengths import Floats, Lengths
from shared.retention import MAX_JOB_LIFETIME
from shared.wire.inferers import InfererEntry
from shared.wire.requests import TEXT_TASKS, Work
from shared.wire.results import Completed, Timings

MAX_SAMPLES = 200
MIN_NOISE = 0.03
"""Standard deviation of each job's own, in log time: no two take equally long."""

PROMPT_SAMPLES = 40
"""Of the latest jobs, whose prompts say how many tokens have to be computed: how much comes from a
cache may change with every job."""
SPEED_SAMPLES = 9
"""The speed of an inferer is the median of this many jobs, so that one absurd measurement, of a
machine that was suspended during the job, does not count."""
MIN_SPEED_SAMPLES = 3
"""For an inferer with fewer jobs, the latest jobs of others are added."""

MAX_RESIDUAL = log(4)
PRIOR_RESIDUALS = (0.0, 0.0, 0.0)
"""Assumed before there are measurements, so that the first residual is not the only one."""

LEAST_TOKEN_S = 1e-9
"""Seconds. Nothing computes a token faster, whatever a result says."""
SLOWEST = 1e-4
"""Tokens per second. Nothing that a client would wait for is slower."""

TOKENS_PER_BYTE = 0.25
ASSUMED_WORK = Work(prompt_bytes=400, max_tokens=256, task="complete")
"""Assumed before there are measurements."""

MAX_PROMPT_BYTES = 64 * 1024 * 1024
"""The largest message a broker can be configured for."""
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Speed:
    """Seconds per token, and per job."""

    prompt_s: float
    token_s: float
    start_s: float = 0.0
    """Of each job, however many tokens it has: what a cached prompt takes."""

    def job_s(self, prompt_tokens: float, tokens: float) -> float:
        return self.start_s + prompt_tokens * self.prompt_s + tokens * self.token_s


class Measurements:
    """The last ones of each inferer, in seconds."""

    def __init__(self) -> None:
        self._of: dict[str, deque[float]] = {}
        self._latest: deque[float] = deque(maxlen=SPEED_SAMPLES)

    def __contains__(self, inferer: str) -> bool:
        return inferer in self._of

    def __bool__(self) -> bool:
        return bool(self._latest)

    def add(self, inferer: str, seconds: float) -> None:
        measured = self._of.pop(inferer, deque(maxlen=SPEED_SAMPLES))
        measured.append(seconds)
        self._of[inferer] = measured
        while len(self._of) > MAX_SAMPLES:  # containers come and go, each with a new id
            del self._of[next(iter(self._of))]
        self._latest.append(seconds)

    def of(self, inferer: str) -> list[float]:
        """Those of this inferer; while it has few, those of others are added."""
        known = [*self._of.get(inferer, ())]
        if len(known) < MIN_SPEED_SAMPLES:
            others = [seconds for seconds in self._latest if seconds not in known]
            known += others[len(known) - MIN_SPEED_SAMPLES :]
        return known


class ServiceTime:
    """The measurements of one model."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        # The parts of `Speed`.
        self._prompt_s = Measurements()
        self._cached_prompt_s = Measurements()
        """Of prompts that were mostly cached, whose time goes to other things: per token it is at
        most so long."""
        self._token_s = Measurements()
        self._start_s = Measurements()
        self._reported: dict[str, Speed] = {}
        """What the self-tests of live inferers measured, or their last jobs."""
        self._prompts: deque[tuple[int, int]] = deque(maxlen=PROMPT_SAMPLES)
        self._works: deque[Work] = deque(maxlen=MAX_SAMPLES)
        self._tokens: deque[tuple[int, int]] = deque(maxlen=MAX_SAMPLES)
        """Computed ones of the prompt, and those of the answers."""
        self._residuals: deque[float] = deque(PRIOR_RESIDUALS, maxlen=MAX_SAMPLES)
        # Computed from the above on first use, and dropped with the next sample.
        self._prompt_line: tuple[float, float] | None = None
        self._residual_array: Floats | None = None
        self._token_array: Floats | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._token_s or self._reported)

    def report(self, inferers: Iterable[InfererEntry]) -> None:
        """Note the speeds that live inferers report. They count until the results of some jobs are
        known."""
        self._reported = {}
        for entry in inferers:
            prompt, answer = entry.prompt_tokens_per_s or 0.0, entry.tokens_per_s or 0.0
            if not set(entry.tasks) & set(TEXT_TASKS):
                answer = 1 / LEAST_TOKEN_S  # it generates none, which takes no time
            if min(prompt, answer) > SLOWEST:
                self._reported[entry.id] = Speed(1 / prompt, 1 / answer)

    def observe(self, result: Completed) -> None:
        """Add a sample. Results without timings or sizes, or with impossible ones, are ignored."""
        timings, usage, inferer, work = result.timings, result.usage, result.inferer, result.work
        if timings is None or inferer is None or work is None:
            return
        prompt_s, total_s = _alone_s(timings)
        if not (
            0 <= prompt_s < total_s <= MAX_JOB_LIFETIME.total_seconds()
            and 0 <= usage.prompt_tokens <= MAX_TOKENS
            and 0 <= usage.computed_tokens <= usage.prompt_tokens
            and 0 <= usage.completion_tokens <= MAX_TOKENS
            and 0 <= work.prompt_bytes <= MAX_PROMPT_BYTES
            and 0 < work.max_tokens <= MAX_TOKENS
        ):
            return
        if inferer in self._token_s:
            speed = self.speed(inferer)
            expected_s = speed.job_s(usage.computed_tokens, usage.completion_tokens)
            if expected_s > 0:
                residual = log(total_s / expected_s)
                self._residuals.append(min(max(residual, -MAX_RESIDUAL), MAX_RESIDUAL))
        self._prompt_line = self._residual_array = self._token_array = None
        self._works.append(work)
        self._prompts.append((work.prompt_bytes, usage.computed_tokens))
        self._tokens.append((usage.computed_tokens, usage.completion_tokens))
        for choice in result.choices:
            was_cut = choice.finish_reason == "length"
            self.lengths.observe(work, choice.completion_tokens, was_cut)
        # The rest of the job as a whole, so that its overhead is included.
        token_s = max((total_s - prompt_s) / max(usage.completion_tokens, 1), LEAST_TOKEN_S)
        self._token_s.add(inferer, token_s)
        is_cached = usage.computed_tokens <= usage.prompt_tokens / 2
        prompts = self._cached_prompt_s if is_cached else self._prompt_s
        prompts.add(inferer, prompt_s / max(usage.computed_tokens, 1))
        tokens_s = usage.computed_tokens * self.speed(inferer).prompt_s
        self._start_s.add(inferer, max(prompt_s - tokens_s, 0.0) if is_cached else 0.0)

    def speed(self, inferer: str) -> Speed:
        """The medians for this inferer; of what was not measured, what is reported."""
        assert self.is_known, "nothing has been measured"
        one = self._reported.get(inferer)
        reported = [one] if one else [*self._reported.values()]
        prompt_s = self._prompt_s.of(inferer) or [speed.prompt_s for speed in reported]
        bounds_s = self._cached_prompt_s.of(inferer)
        return Speed(
            min(median_low(seconds) for seconds in (prompt_s, bounds_s) if seconds),
            median_low(self._token_s.of(inferer) or [speed.token_s for speed in reported]),
            median_low(self._start_s.of(inferer) or [0.0]),
        )

    def prompt_tokens(self, prompt_bytes: int) -> float:
        """How many tokens of a prompt of this length have to be computed, as expected."""
        if self._prompt_line is None:
            self._prompt_line = _fit(self._prompts) if self._prompts else (TOKENS_PER_BYTE, 0.0)
        slope, intercept = self._prompt_line
        return max(intercept + slope * prompt_bytes, 1.0)

    def typical_work(self) -> Work:
        """A request like the recent ones."""
        if not self._works:
            return ASSUMED_WORK
        return Work(
            prompt_bytes=int(numpy.mean([work.prompt_bytes for work in self._works])),
            max_tokens=int(numpy.median([work.max_tokens for work in self._works])),
            task=self._works[-1].task,
            n=int(numpy.median([work.n for work in self._works])),
        )

    def sample_tokens(self, random: numpy.random.Generator, draws: int) -> tuple[Floats, Floats]:
        """Tokens to compute of prompts, and tokens of answers, of requests like the recent ones,
        for jobs whose size is not known."""
        if not self._tokens:
            prompt_tokens = self.prompt_tokens(ASSUMED_WORK.prompt_bytes)
            tokens = self.lengths.sample(ASSUMED_WORK, 0, 1 - random.random(draws))
            return numpy.full(draws, prompt_tokens), tokens
        if self._token_array is None:
            self._token_array = numpy.array(self._tokens, dtype=float).T
        which = random.integers(0, len(self._tokens), draws)
        prompt_tokens, tokens = self._token_array[:, which]
        return prompt_tokens, tokens

    def sample_residuals(self, random: numpy.random.Generator, draws: int) -> Floats:
        """Factors, actual over expected time, drawn from those of recent jobs."""
        if self._residual_array is None:
            self._residual_array = numpy.exp(self._residuals)
        factors: Floats = random.choice(self._residual_array, draws)
        return factors


def _fit(prompts: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Slope and intercept of tokens over bytes by least squares; through 0 if all sizes are
    equal."""
    sizes, tokens = numpy.array(list(prompts), dtype=float).T
    spread = sizes - sizes.mean()
    if not spread.any():
        return float(tokens.sum() / max(sizes.sum(), 1)), 0.0
    slope = float((spread * tokens).sum() / (spread**2).sum())
    return slope, float(tokens.mean() - slope * sizes.mean())


def _alone_s(timings: Timings) -> tuple[float, float]:
    """Seconds until the first token and to the end of the attempt, less what is due to other jobs.
    Inferers of earlier versions report only the parts. The difference of two times of day is not
    used, since clocks are set and machines sleep."""
    total_ms = timings.total_ms
    if total_ms is None:
        total_ms = timings.prompt_ms + timings.generation_ms
    prompt_ms = timings.prompt_ms - timings.prompt_delay_ms
    total_ms -= timings.prompt_delay_ms + timings.generation_delay_ms
    return prompt_ms / 1000, total_ms / 1000
