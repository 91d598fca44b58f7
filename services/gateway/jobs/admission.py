"""The limit of each model's queue. Accepted jobs are never dropped, so jobs beyond the limit are
refused."""

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.eta.forecast import Forecast
from services.gateway.state.fleet import Fleet
from shared.broker.consumers import ModelConsumers
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
    """Counts, since this gateway started, the jobs of one model that it reserved a place for, and
    those of them whose publish has ended, successfully or not."""

    def __init__(self) -> None:
        self.reserved = 0
        self.ended = 0
        self._read: ModelConsumers | None = None
        self._ended_before = 0

    def not_in(self, read: ModelConsumers) -> int:
        """How many jobs ``read``, the last state of the model that was read, may not count."""
        if self._read is not read:
            self._read, self._ended_before = read, self.ended
        return self.reserved - self._ended_before


class Admission:
    """How many jobs may wait. Gateways count separately, so several may slightly exceed it."""

    def __init__(self, fleet: Fleet, forecast: Forecast, bound: int) -> None:
        self.bound = bound
        self._fleet = fleet
        self._forecast = forecast
        self._reservations: defaultdict[str, Reservations] = defaultdict(Reservations)

    @asynccontextmanager
    async def reserved(self, model: ModelConsumers) -> AsyncIterator[None]:
        """A place in the queue of ``model`` for the job that the block publishes.

        Raises:
            QueueFull: the limit is reached.
            UnknownModel, BrokerUnavailable: see `Fleet.model`.
        """
        own = self._reservations[model.token]
        if 2 * (model.waiting + own.not_in(model)) >= self.bound:
            # A publish that ended before this read is in the broker's count; others may not be.
            ended = own.ended
            now = await self._fleet.model(model.token)
            waiting = now.waiting + own.reserved - ended
            if excess := jobs_to_end(waiting, self.bound, now.limit):
                raise self._full(now, self._forecast.retry_after_s(now, excess))
        own.reserved += 1
        try:
            yield
        finally:
            own.ended += 1

    def _full(self, model: ModelConsumers, retry_after_s: int) -> QueueFull:
        return QueueFull(
            f"the queue of {model.name} is full, no more than {self.bound} jobs may wait; "
            f"try again in {retry_after_s} s",
            retry_after_s,
        )
