"""The limit of each model's queue. Accepted jobs are never dropped, so jobs beyond the limit are
refused."""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from services.gateway.eta.forecast import Forecast
from services.gateway.state.fleet import Fleet
from shared.broker.consumers import ModelConsumers
from shared.counts import counted
from shared.errors import QueueFull

JOBS_PER_SLOT = 10


def jobs_to_end(waiting: int, bound: int, slots: int) -> int:
    """How many of ``waiting`` jobs must leave the queue before a new one should be submitted; 0 if
    it is admitted now.

    When the queue is full, that is a tenth of the bound, or `JOBS_PER_SLOT` for each slot if that
    is fewer: the clients that were refused should not all come back for one place.
    """
    if waiting < bound:
        return 0
    return waiting - bound + max(1, min(bound // 10, JOBS_PER_SLOT * slots))


class Reservations:
    """The jobs of one model that this gateway has reserved places for and the broker's count may
    not include yet: those being published, and those published since it was asked."""

    def __init__(self) -> None:
        self.publishing = 0
        self._ended_at: list[float] = []
        """When publishes ended, successfully or not (`time.monotonic`), in order."""

    def not_in(self, read: ModelConsumers) -> int:
        """How many jobs ``read`` may not count."""
        counted = bisect_left(self._ended_at, read.asked_at)
        return self.publishing + len(self._ended_at) - counted

    def forget_before(self, read: ModelConsumers) -> None:
        """Forget what ``read``, and every later one, counts."""
        del self._ended_at[: bisect_left(self._ended_at, read.asked_at)]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count the job that the block publishes."""
        self.publishing += 1
        try:
            yield
        finally:
            self.publishing -= 1
            self._ended_at.append(time.monotonic())


class Admission:
    """How many jobs may wait. More may be accepted by a few: gateways count separately, and the
    broker may count a job a few milliseconds after it has confirmed it."""

    def __init__(self, fleet: Fleet, forecast: Forecast, bound: int) -> None:
        self.bound = bound
        self._fleet = fleet
        self._forecast = forecast
        self._reservations: defaultdict[str, Reservations] = defaultdict(Reservations)

    @asynccontextmanager
    async def reserved(self, model: ModelConsumers) -> AsyncIterator[None]:
        """A place in the queue of ``model``, as of the last refresh, for the job that the block
        publishes.

        Raises:
            QueueFull: the limit is reached.
            UnknownModel, BrokerUnavailable: see `Fleet.model`.
        """
        own = self._reservations[model.token]
        own.forget_before(model)
        if 2 * (model.waiting + own.not_in(model)) >= self.bound:
            now = await self._fleet.model(model.token)
            waiting = now.waiting + own.not_in(now)
            if excess := jobs_to_end(waiting, self.bound, now.limit):
                raise self._full(now, self._forecast.retry_after_s(now, excess))
        with own.hold():
            yield

    def _full(self, model: ModelConsumers, retry_after_s: int) -> QueueFull:
        return QueueFull(
            f"the queue of {model.name} is full, no more than {counted(self.bound, 'job')} may "
            f"wait; try again in {retry_after_s} s",
            retry_after_s,
        )
