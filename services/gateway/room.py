"""The bound on each model's queue: nothing that was accepted is dropped, so what is too much is
refused before."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.eta.forecast import Forecast
from services.gateway.fleet import Fleet
from shared.consumers import ModelConsumers
from shared.errors import QueueFull

SHARE_TO_LEAVE = 10
"""Who is refused is told to come again when a tenth of the bound will be free, not all of them
when there is one place."""


class Room:
    """How many may wait. Every gateway counts for itself, so several may go over it by a little."""

    def __init__(self, fleet: Fleet, forecast: Forecast, bound: int) -> None:
        self.bound = bound
        self._fleet = fleet
        self._forecast = forecast
        self._accepted: dict[str, tuple[ModelConsumers, int]] = {}
        self._coming: Counter[str] = Counter()

    @asynccontextmanager
    async def taken(self, model: ModelConsumers) -> AsyncIterator[None]:
        """A place in the queue of ``model`` for the job that the block publishes.

        Raises:
            QueueFull: there is none.
            UnknownModel, BrokerUnavailable: see `Fleet.model`.
        """
        if 2 * self._waiting_at_most(model) >= self.bound:
            now = await self._fleet.model(model.name)
            waiting = now.waiting + self._coming[model.name]
            if waiting >= self.bound:
                leave = max(1, self.bound // SHARE_TO_LEAVE)
                retry_after_s = self._forecast.retry_after_s(now, waiting - self.bound + leave)
                raise QueueFull(
                    f"{waiting} jobs wait for {model.name}, and no more than {self.bound} may; "
                    f"try again in {retry_after_s} s",
                    retry_after_s,
                )
        self._coming[model.name] += 1
        try:
            yield
        finally:
            self._coming[model.name] -= 1
            seen, count = self._accepted.get(model.name, (model, 0))
            self._accepted[model.name] = (model, count + 1 if seen is model else 1)

    def _waiting_at_most(self, model: ModelConsumers) -> int:
        """What waited at the fleet's last look, and all that came through here since."""
        seen, count = self._accepted.get(model.name, (model, 0))
        return model.waiting + self._coming[model.name] + (count if seen is model else 0)
