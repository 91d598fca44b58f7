"""``INFERER_CONCURRENCY=auto``: as many jobs at once as make those of a queue end soonest on
average, or about as soon."""

import math
from collections.abc import Awaitable, Callable, Mapping
from statistics import mean

from services.inferer.engine.set_up import AnyEngine
from services.inferer.worker.slots import Slots
from shared.background import Tasks
from shared.errors import ModelError, OutOfMemory
from shared.logs import logger

MOST = 8
"""More gain little on a CPU, and each takes the memory of a context."""
NOISE = 0.1
"""Measurements vary by so much. Without it, the number would change every second where several are
nearly as good, and nobody could say when a job ends. So a larger number must be better by so much;
a smaller one, which suits short queues, too, need only be better."""
QUEUE = 16
"""How many jobs there are, in the comparison of numbers of slots."""

log = logger()


def best_concurrency(
    step_s: Mapping[int, float], most: int, current: int = 0, per_batch: int | None = None
) -> int:
    """How many jobs should run at once, at most ``most`` (decision 38).

    If at most ``per_batch`` are computed at the same time, others take turns in the last place of
    each batch. Where so many pay, one more does: it does not slow the older ones, and keeps all
    threads busy when they end.
    """
    in_batch = min(per_batch or most, most)
    best = _best_in_batch(step_s, in_batch, min(current, in_batch))
    takes_turns = best == per_batch and best > 1
    return min(best + takes_turns, most)


def _best_in_batch(step_s: Mapping[int, float], most: int, current: int) -> int:
    """With how many in each batch the jobs of a queue end soonest on average, by the measured
    seconds of a step with so many. What has not been measured is taken to pay until it has. More
    than ``current`` must be better by `NOISE`; fewer need only be better.

    Of `QUEUE` equal jobs, the first n end after as many steps of n sequences as a job needs alone,
    the next n after twice as many, and so on: the best n has the earliest mean of these times.
    """
    mean_end_s = {n: seconds * _mean_round(n) for n, seconds in step_s.items() if n <= most}
    if not mean_end_s:
        return most
    for n in mean_end_s:
        if n > current:
            mean_end_s[n] *= 1 + NOISE
    best = min(mean_end_s, key=mean_end_s.__getitem__)
    worse = min((n for n in mean_end_s if n > best), default=None)
    # Nothing between the two has been measured: try the middle.
    return most if worse is None else best + (worse - best) // 2


def _mean_round(at_once: int) -> float:
    return mean(math.ceil(job / at_once) for job in range(1, QUEUE + 1))


class AutoConcurrency:
    """Opens and closes slots as jobs come and end."""

    def __init__(
        self, engine: AnyEngine, slots: Slots, make_room: Callable[[int], Awaitable[None]]
    ) -> None:
        """``make_room`` has the engine make room for so many jobs, or raises `ModelError`."""
        self._engine = engine
        self._slots = slots
        self._make_room = make_room
        self._most = MOST
        self._growths = Tasks()
        self._is_growing = False
        self._grows_when_idle = False
        """Whether the engine cannot move running jobs of this model to a larger context."""

    def adjust(self) -> None:
        """Have as many slots as pay. When all are busy, room for twice as many is made."""
        before, room = self._slots.count, self._engine.slots
        step_s, per_batch = self._engine.step_s, self._engine.jobs_per_batch
        best = best_concurrency(step_s, self._most, before, per_batch)
        busy = self._slots.busy
        is_time = busy == 0 if self._grows_when_idle else busy >= room
        if best > room and is_time and not self._is_growing:
            self._is_growing = True
            self._growths.start(self._grow(min(best, 2 * room)), "make room for slots")
        if (count := min(best, room)) != before:
            self._slots.set(count)
            log.info("concurrency_adjusted", before=before, concurrency=count)

    async def end(self) -> None:
        await self._growths.end(0)

    async def _grow(self, count: int) -> None:
        try:
            await self._make_room(count)
        except OutOfMemory as error:
            self._most = self._engine.slots
            log.warning("no_more_slots", concurrency=self._most, error=error.message)
        except ModelError as error:
            self._grows_when_idle = True
            log.warning("slots_open_when_idle", error=error.message)
        finally:
            self._is_growing = False
        self.adjust()
