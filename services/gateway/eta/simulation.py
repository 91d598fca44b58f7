"""From the jobs that run and wait to the moments at which they will be done."""

from dataclasses import dataclass
from datetime import datetime

import numpy

from services.gateway.eta.lengths import Floats
from services.gateway.eta.running_jobs import Run
from services.gateway.eta.service_time import Pace
from shared.wire.requests import Work

DRAWS = 200
SEED = 1
"""Always the same: two looks at the same queue should say the same."""
FUTURES = numpy.arange(DRAWS)
HALF = 0.5**0.5


@dataclass(frozen=True)
class Slot:
    """One slot of a live inferer, and the job that it runs, if it runs one."""

    inferer: str
    run: Run | None = None


class Simulation:
    """Many futures at once: in each, answers get lengths like those that were seen."""

    def __init__(self, pace: Pace, slots: list[Slot], now: datetime) -> None:
        """``slots`` must not be empty, and ``pace`` must know something; ``now`` is the broker's
        time."""
        self._pace = pace
        self._slots = slots
        self._random = numpy.random.default_rng(SEED)
        # What makes one job slow, a busy machine, makes the next one slow: half of it is common.
        self._common = pace.luck(self._random, DRAWS) ** HALF
        self._prompt_s = numpy.array([pace.speed(slot.inferer).prompt_s for slot in slots])
        self._token_s = numpy.array([pace.speed(slot.inferer).token_s for slot in slots])
        self.free_s = numpy.stack([self._remaining(slot, now) for slot in slots])
        """Seconds until each slot is free, in each future."""

    def serve(self, work: Work) -> Floats:
        """Give ``work`` to the slot that is free first; seconds until it is done."""
        first = self.free_s.argmin(axis=0)
        prompt_tokens = self._pace.prompt_tokens(work.prompt_bytes)
        tokens = self._sample(work, beyond=0)
        took = prompt_tokens * self._prompt_s[first] + tokens * self._token_s[first]
        done: Floats = self.free_s[first, FUTURES] + took * self._luck()
        self.free_s[first, FUTURES] = done
        return done

    def serve_usual(self, count: int) -> None:
        """As `serve` for ``count`` jobs of which nothing is known, all at once."""
        if count > 0:
            work = self._pace.usual_work()
            prompt_tokens = self._pace.prompt_tokens(work.prompt_bytes)
            tokens = self._sample(work, beyond=0).mean()
            per_s = (1 / (prompt_tokens * self._prompt_s + tokens * self._token_s)).sum()
            self.free_s += count / per_s * self._common

    def _remaining(self, slot: Slot, now: datetime) -> Floats:
        if slot.run is None:
            return numpy.zeros(DRAWS)
        work, elapsed_s = slot.run.work or self._pace.usual_work(), slot.run.elapsed_s(now)
        speed = self._pace.speed(slot.inferer)
        prompt_s = self._pace.prompt_tokens(work.prompt_bytes) * speed.prompt_s
        so_far = max(slot.run.tokens, int((elapsed_s - prompt_s) / speed.token_s), 0)
        so_far = min(so_far, work.max_tokens - 1)
        luck = self._luck()
        whole = (prompt_s + self._sample(work, beyond=so_far) * speed.token_s) * luck
        # At least the token that is being made.
        return numpy.maximum(whole - elapsed_s, speed.token_s)

    def _sample(self, work: Work, beyond: int) -> Floats:
        uniform = self._random.random(DRAWS)
        return self._pace.lengths.sample(work, beyond, uniform)

    def _luck(self) -> Floats:
        return self._common * self._pace.luck(self._random, DRAWS) ** HALF
