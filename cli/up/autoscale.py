"""As many inferers as the waiting jobs need: started when they wait, gone when idle."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx
import msgspec
from msgspec import Struct

from cli.up.child import Child
from cli.up.scale import Scale
from shared.logs import logger
from shared.model_names import token_of
from shared.timestamps import milliseconds_between, parse_timestamp, timestamp
from shared.wire.api import ConcurrencyReport, ConcurrencyRequest, FleetReport, QueueReport
from shared.wire.codecs import encode
from shared.wire.inferers import InfererEntry

LOOK_EVERY_S = 1.0
LOOK_WHEN_NONE_RUNS_S = 0.2
"""It adds to the time to the first token, and takes no CPU from a computation."""

STARTING_S = 300.0
"""One that is not live after so long hangs: its jobs are not waited for it to take."""

ANSWER_TIMEOUT_S = 15.0
"""A gateway waits up to 10 s for an inferer to close its slots."""

RETIRE_S = 5.0
"""How long one without a job may take to end."""

log = logger()


class _Sight(Struct, frozen=True):
    """What was to be done at one look, and who was there to do it."""

    unfinished: int
    """Jobs that wait or run."""
    live: dict[str, InfererEntry]
    """The inferers of our model by id, ours and others."""
    slots: int
    """How many jobs these take at once, and those of ours that are starting."""
    at: str
    """When that was, by the broker's clock."""


class Autoscaler:
    """Keeps as many of the ``inferers`` running as ``scale`` and the queue of ``model`` ask for."""

    def __init__(
        self, url: str, model: str, concurrency: int, scale: Scale, inferers: Sequence[Child]
    ) -> None:
        """``concurrency`` is what each inferer starts with, its name the id of its entry."""
        self._http = httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False)
        self._token = token_of(model)
        self._concurrency = concurrency
        self._scale = scale
        self._inferers = {inferer.name: inferer for inferer in inferers}

    async def run(self) -> None:
        """Look and adjust until cancelled; through outages of the gateway and the broker, too."""
        async with self._http:
            while True:
                try:
                    await self._adjust(await self._look())
                    pause_s = LOOK_EVERY_S if self._running else LOOK_WHEN_NONE_RUNS_S
                except (httpx.HTTPError, msgspec.DecodeError) as error:
                    log.warning("queue_not_seen", error=repr(error))
                    pause_s = LOOK_EVERY_S
                await asyncio.sleep(pause_s)

    @property
    def _running(self) -> list[Child]:
        return [inferer for inferer in self._inferers.values() if inferer.is_wanted]

    async def _look(self) -> _Sight:
        """The queue first: what an inferer holds afterwards has been counted."""
        answer = (await self._http.get("/queue")).raise_for_status()
        queues = msgspec.json.decode(answer.content, type=QueueReport).models
        answer = (await self._http.get("/inferers")).raise_for_status()
        fleet = msgspec.json.decode(answer.content, type=FleetReport)
        live = {entry.id: entry for entry in fleet.inferers if self._is_live(entry)}
        starting = [
            inferer
            for inferer in self._running
            if inferer.name not in live and _age_s(inferer.started_at) < STARTING_S
        ]
        return _Sight(
            unfinished=sum(
                q.waiting + q.in_flight for q in queues if token_of(q.model) == self._token
            ),
            live=live,
            slots=sum(entry.slots for entry in live.values()) + self._concurrency * len(starting),
            at=fleet.at or timestamp(),
        )

    def _is_live(self, entry: InfererEntry) -> bool:
        """Whether it can take our jobs; the entry of a process of ours that was killed a moment
        ago may still be there."""
        inferer = self._inferers.get(entry.id)
        if inferer is None:
            return token_of(entry.model) == self._token
        return inferer.is_wanted and entry.started_at >= inferer.started_at

    async def _adjust(self, sight: _Sight) -> None:
        if sight.live.keys() & self._inferers.keys():
            for inferer in self._inferers.values():
                inferer.keep_trying()
        slots = sight.slots
        for inferer in self._inferers.values():
            if slots < sight.unfinished and not inferer.is_wanted:
                log.info("inferer_wanted", inferer=inferer.name, unfinished=sight.unfinished)
                inferer.start()
                slots += self._concurrency
        if len(self._running) > self._scale.least:
            # The last to have come into play goes first.
            for inferer in reversed(self._running):
                if self._may_leave(inferer, sight):
                    await self._retire(inferer, sight.live[inferer.name].slots)
                    return

    def _may_leave(self, inferer: Child, sight: _Sight) -> bool:
        """Whether it has been idle for long enough, and the others can take all there is."""
        entry = sight.live.get(inferer.name)
        if entry is None or entry.idle_since is None:
            return False
        idle_ms = milliseconds_between(entry.idle_since, sight.at)
        return (
            idle_ms >= self._scale.idle_s * 1000 and sight.unfinished <= sight.slots - entry.slots
        )

    async def _retire(self, inferer: Child, slots: int) -> None:
        """Let it take no more jobs; then let it leave, unless it has got one by then."""
        if await self._has_closed(inferer):
            await inferer.rest(RETIRE_S)
            log.info("inferer_retired", inferer=inferer.name)
            return
        # Whatever becomes of the gateway meanwhile: left closed, it would never work again.
        while not await self._order(inferer, slots):
            await asyncio.sleep(LOOK_EVERY_S)

    async def _has_closed(self, inferer: Child) -> bool:
        if not await self._order(inferer, 0):
            return False
        try:
            sight = await self._look()
        except (httpx.HTTPError, msgspec.DecodeError):
            return False
        entry = sight.live.get(inferer.name)
        # An entry with slots is older than the order, and says nothing of the last moment.
        return entry is not None and entry.slots == 0 and self._may_leave(inferer, sight)

    async def _order(self, inferer: Child, slots: int) -> bool:
        """Give it so many slots; whether it has them, or is gone and will start with its own."""
        order = encode(ConcurrencyRequest(concurrency=slots, inferer=inferer.name))
        try:
            answer = await self._http.put("/concurrency", content=order)
            if answer.status_code == httpx.codes.NOT_FOUND:
                return True
            report = msgspec.json.decode(answer.raise_for_status().content, type=ConcurrencyReport)
        except (httpx.HTTPError, msgspec.DecodeError):
            return False
        return all(change.refused is None for change in report.inferers)


def _age_s(at: str) -> float:
    return (datetime.now(UTC) - parse_timestamp(at)).total_seconds()
