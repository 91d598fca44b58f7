"""The bound on each model's queue: nothing that was accepted is dropped, so what is too much is
refused before."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.eta.forecast import Forecast
from services.gateway.state.fleet import Fleet
from shared.broker.consumers import ModelConsumers
from shared.errors import QueueFull

JOBS_A_SLOT = 10
"""Who is refused is told to come again when so many jobs for each slot have gone, or a tenth of the
bound if that is less: not all of them when there is one place."""


class Room:
    """How many may wait. Every gateway counts for itself, so several may go over it by a little."""

    def __init__(self, fleet: Fleet, forecast: Forecast, bound: int) -> None:
        self.bound = bound
        self._fleet = fleet
        self._forecast = forecast
        self._begun: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._looked: dict[str, tuple[ModelConsumers, int]] = {}

    @asynccontextmanager
    async def taken(self, model: ModelConsumers) -> AsyncIterator[None]:
        """A place in the queue of ``model`` for the job that the block publishes.

        Raises:
            QueueFull: there is none.
            UnknownModel, BrokerUnavailable: see `Fleet.model`.
        """
        name = model.token
        if 2 * (model.waiting + self._since(model)) >= self.bound:
            # Those that were done before are in the broker's count; the others may not be.
            done = self._done[name]
            now = await self._fleet.model(name)
            waiting = now.waiting + self._begun[name] - done
            if waiting >= self.bound:
                raise self._full(now, waiting)
        self._begun[name] += 1
        try:
            yield
        finally:
            self._done[name] += 1

    def _since(self, model: ModelConsumers) -> int:
        """How many have come through here since the fleet looked at ``model``, or are about to."""
        looked, done = self._looked.get(model.token, (None, 0))
        if looked is not model:
            done = self._done[model.token]
            self._looked[model.token] = (model, done)
        return self._begun[model.token] - done

    def _full(self, model: ModelConsumers, waiting: int) -> QueueFull:
        leave = max(1, min(self.bound // 10, JOBS_A_SLOT * model.limit))
        retry_after_s = self._forecast.retry_after_s(model, waiting - self.bound + leave)
        return QueueFull(
            f"the queue of {model.name} is full, no more than {self.bound} jobs may wait; "
            f"try again in {retry_after_s} s",
            retry_after_s,
        )
