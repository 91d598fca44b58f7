"""Which models exist, which inferers live, and the limit that follows from it.

Everything is read afresh from the broker every time, so any number of gateways may do it at once.
"""

import asyncio

import nats.js.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo

from shared import subjects
from shared.broker import Broker, unavailable_on_outage
from shared.errors import InvalidRequest, TopologyError, UnknownModel
from shared.fleet import read_inferers, read_models
from shared.logs import logger
from shared.messages import FleetReport, InfererEntry, ModelFacts
from shared.topology import Topology, ensure_consumer, facts_of, is_ours

REFRESH_S = 2.0

log = logger()


class Fleet:
    """The models and inferers as of the last look, at most a few seconds ago."""

    def __init__(self, broker: Broker, topology: Topology) -> None:
        self._broker = broker
        self._topology = topology
        self._changed = asyncio.Event()
        self.models: dict[str, ConsumerInfo] = {}
        self.inferers: dict[str, list[InfererEntry]] = {}
        broker.on_reconnect(self._changed.set)

    async def watch(self) -> None:
        """Hear of inferers that come and go."""
        await self._broker.nc.subscribe(f"$KV.{subjects.INFERERS}.>", cb=self._hear)

    async def change(self) -> None:
        """Wait until an inferer has come or gone, a few seconds at most."""
        try:
            async with asyncio.timeout(REFRESH_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def refresh(self) -> None:
        """Read entries and consumers, and let every consumer be as its inferers need it.

        Raises:
            BrokerUnavailable: no answer, or what should be there is not.
        """
        live, some_died = await read_inferers(self._broker)
        entries: dict[str, list[InfererEntry]] = {}
        for one in live:
            entries.setdefault(one.entry.model, []).append(one.entry)
        models = await read_models(self._broker)
        for model in sorted(models.keys() | entries.keys()):
            try:
                await self._adjust(model, entries.get(model, []), models.get(model), some_died)
            except TopologyError as error:
                log.error("limit_not_set", model=model, error=error.message)
        if entries.keys() - models.keys():
            models = await read_models(self._broker)
        self.models, self.inferers = models, entries

    async def report(self) -> FleetReport:
        """Every live inferer, read afresh.

        Raises:
            BrokerUnavailable: no answer.
        """
        live, _ = await read_inferers(self._broker)
        return FleetReport([one.entry for one in live])

    async def consumer(self, model: str) -> ConsumerInfo:
        """The model's consumer as it is now.

        Raises:
            UnknownModel: there is none.
            BrokerUnavailable: no answer.
        """
        if not subjects.is_model_name(model):
            raise UnknownModel(f"{model!r} is no name of a model: use a-z, 0-9, _ and -")
        info: ConsumerInfo | None
        with unavailable_on_outage(self._broker):
            try:
                info = await self._broker.js.consumer_info(subjects.REQUESTS, model)
            except nats.js.errors.NotFoundError:
                info = None
        if info is None or not is_ours(info):
            known = ", ".join(sorted(self.models)) or "none yet: start an inferer"
            raise UnknownModel(f"no model {model!r} is served; known: {known}")
        return info

    async def choose(self, model: str | None) -> tuple[str, ModelFacts | None]:
        """The model to use and what is known of it; ``model`` may be left out if only one is.

        Raises:
            UnknownModel: no such model, or none at all.
            InvalidRequest: several are served and none was named.
            BrokerUnavailable: no answer.
        """
        if model is None:
            model = self._only_model()
        info = self.models.get(model) or await self.consumer(model)
        return model, facts_of(info)

    def _only_model(self) -> str:
        names = sorted(self.models)
        live = sorted(self.inferers)
        if len(names) == 1 or len(live) == 1:
            return names[0] if len(names) == 1 else live[0]
        if not names:
            raise UnknownModel("no model is served yet: start an inferer")
        raise InvalidRequest(f"model: name one of {', '.join(names)}", "model")

    async def _adjust(
        self,
        model: str,
        inferers: list[InfererEntry],
        info: ConsumerInfo | None,
        some_died: bool,
    ) -> None:
        """One job for each live slot, never below one; and what to remember of the model."""
        limit = max(1, sum(inferer.slots for inferer in inferers))
        if info is not None and some_died and _has_orphans(info, inferers):
            # Until the dead one's job comes back it takes a place, which the living must not lack.
            limit = max(limit, info.config.max_ack_pending or 1)
        known = facts_of(info) if info else None
        newest = max(inferers, key=lambda inferer: inferer.started_at, default=None)
        facts = (
            known
            if newest is None
            else ModelFacts(n_ctx=newest.n_ctx, chat=newest.chat, token_bytes=newest.token_bytes)
        )
        if info is not None and info.config.max_ack_pending == limit and known == facts:
            return
        await ensure_consumer(self._broker, self._topology, model, limit, facts)
        log.info("consumer_set", model=model, limit=limit, inferers=len(inferers))

    async def _hear(self, message: Msg) -> None:
        # Every refresh of every entry passes here; only arrivals and departures matter at once.
        inferer_id = subjects.last_token(message.subject)
        known = {entry.id for entries in self.inferers.values() for entry in entries}
        if bool(message.data) != (inferer_id in known):
            self._changed.set()


def _has_orphans(info: ConsumerInfo, inferers: list[InfererEntry]) -> bool:
    """Whether a job is out that no live inferer speaks of."""
    return (info.num_ack_pending or 0) > sum(len(inferer.jobs) for inferer in inferers)
