"""Simulates the queue: when each slot becomes free, and when each waiting job is done."""

from dataclasses import dataclass
from datetime import datetime

import numpy

from services.gateway.eta.lengths import Floats
from services.gateway.eta.running_jobs import RunningAttempt
from services.gateway.eta.service_time import ServiceTime
from shared.wire.requests import Work

DRAWS = 200
SEED = 1
"""Fixed, so that two estimates of the same queue agree."""
ALL_DRAWS = numpy.arange(DRAWS)
HALF = 0.5**0.5


@dataclass(frozen=True)
class Slot:
    """One slot of a live inferer, and the attempt that it runs, if any."""

    inferer: str
    attempt: RunningAttempt | None = None


class Simulation:
    """A Monte Carlo simulation: each draw gives every answer a length from the distribution."""

    def __init__(self, service_time: ServiceTime, slots: list[Slot], now: datetime) -> None:
        """``slots`` must not be empty, and ``service_time`` needs at least one sample; ``now`` is
        the broker's time."""
        self._service_time = service_time
        self._slots = slots
        self._random = numpy.random.default_rng(SEED)
        # What makes one job slow, a busy machine, also slows the next one: half of the residual is
        # common to all jobs of a draw.
        self._common = service_time.sample_residuals(self._random, DRAWS) ** HALF
        speeds = [service_time.speed(slot.inferer) for slot in slots]
        self._prompt_s = numpy.array([speed.prompt_s for speed in speeds])
        self._token_s = numpy.array([speed.token_s for speed in speeds])
        self.free_s = numpy.stack([self._remaining_s(slot, now) for slot in slots])
        """Seconds until each slot is free, in each draw."""

    def serve(self, work: Work) -> Floats:
        """Give ``work`` to the slot that is free first. Returns the seconds until it is done."""
        first = self.free_s.argmin(axis=0)
        prompt_tokens = self._service_time.prompt_tokens(work.prompt_bytes)
        tokens = self._sample_lengths(work, beyond=0)
        expected_s = prompt_tokens * self._prompt_s[first] + tokens * self._token_s[first]
        done_s: Floats = self.free_s[first, ALL_DRAWS] + expected_s * self._sample_residuals()
        self.free_s[first, ALL_DRAWS] = done_s
        return done_s

    def serve_typical(self, count: int) -> None:
        """Serve ``count`` jobs of unknown size, in one step."""
        if count > 0:
            work = self._service_time.typical_work()
            prompt_tokens = self._service_time.prompt_tokens(work.prompt_bytes)
            tokens = self._sample_lengths(work, beyond=0).mean()
            jobs_per_s = (1 / (prompt_tokens * self._prompt_s + tokens * self._token_s)).sum()
            self.free_s += count / jobs_per_s * self._common

    def _remaining_s(self, slot: Slot, now: datetime) -> Floats:
        """Seconds until the attempt in ``slot`` is done, in each draw."""
        if slot.attempt is None:
            return numpy.zeros(DRAWS)
        work = slot.attempt.work or self._service_time.typical_work()
        elapsed_s = slot.attempt.elapsed_s(now)
        speed = self._service_time.speed(slot.inferer)
        prompt_s = self._service_time.prompt_tokens(work.prompt_bytes) * speed.prompt_s
        so_far = max(slot.attempt.tokens, int((elapsed_s - prompt_s) / speed.token_s), 0)
        so_far = min(so_far, work.max_tokens - 1)
        residuals = self._sample_residuals()
        lengths = self._sample_lengths(work, beyond=so_far)
        total_s = (prompt_s + lengths * speed.token_s) * residuals
        # At least the token that is being computed.
        return numpy.maximum(total_s - elapsed_s, speed.token_s)

    def _sample_lengths(self, work: Work, beyond: int) -> Floats:
        uniform = self._random.random(DRAWS)
        return self._service_time.lengths.sample(work, beyond, uniform)

    def _sample_residuals(self) -> Floats:
        return self._common * self._service_time.sample_residuals(self._random, DRAWS) ** HALF
