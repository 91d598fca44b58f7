"""Starts inferers when jobs wait, and stops those that have been idle for a while."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx2
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

POLL_S = 1.0
POLL_WITHOUT_INFERERS_S = 0.2
"""Shorter, because it adds to the time to the first token, and no computation needs the CPU."""

START_TIMEOUT_S = 300.0
"""An inferer that is not live after this time no longer counts as starting."""

REQUEST_TIMEOUT_S = 15.0
"""A gateway waits up to 10 s for an inferer to close its slots."""

STOP_TIMEOUT_S = 5.0
"""How long an inferer without a job may take to end."""

log = logger()


class _Snapshot(Struct, frozen=True):
    """The queue and the inferers of the model at one moment."""

    unfinished: int
    """Jobs that wait or run."""
    live: dict[str, InfererEntry]
    """The live inferers of the model by id, including those started elsewhere."""
    slots: int
    """The slots of live inferers, and of those that are starting here."""
    at: str
    """The broker's time."""


class Autoscaler:
    """Runs as many of the ``inferers`` as the queue of ``model`` needs, within ``scale``."""

    def __init__(
        self, url: str, model: str, concurrency: int, scale: Scale, inferers: Sequence[Child]
    ) -> None:
        """``concurrency`` is the initial number of slots of each inferer; its name is its id."""
        self._http = httpx2.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        self._token = token_of(model)
        self._concurrency = concurrency
        self._scale = scale
        self._inferers = {inferer.name: inferer for inferer in inferers}

    async def run(self) -> None:
        """Poll and adjust until cancelled, also through outages of the gateway and the broker."""
        async with self._http:
            while True:
                try:
                    await self._adjust(await self._read())
                    pause_s = POLL_S if self._running else POLL_WITHOUT_INFERERS_S
                except (httpx2.HTTPError, msgspec.DecodeError) as error:
                    log.warning("queue_not_read", error=repr(error))
                    pause_s = POLL_S
                await asyncio.sleep(pause_s)

    @property
    def _running(self) -> list[Child]:
        return [inferer for inferer in self._inferers.values() if inferer.is_wanted]

    async def _read(self) -> _Snapshot:
        """The queue is read first, so that a job that an inferer takes in between is counted."""
        answer = (await self._http.get("/queue")).raise_for_status()
        queues = msgspec.json.decode(answer.content, type=QueueReport).models
        answer = (await self._http.get("/inferers")).raise_for_status()
        fleet = msgspec.json.decode(answer.content, type=FleetReport)
        live = {entry.id: entry for entry in fleet.inferers if self._is_live(entry)}
        starting = [
            inferer
            for inferer in self._running
            if inferer.name not in live and _age_s(inferer.started_at) < START_TIMEOUT_S
        ]
        return _Snapshot(
            unfinished=sum(
                q.waiting + q.in_flight for q in queues if token_of(q.model) == self._token
            ),
            live=live,
            slots=sum(entry.slots for entry in live.values()) + self._concurrency * len(starting),
            at=fleet.at or timestamp(),
        )

    def _is_live(self, entry: InfererEntry) -> bool:
        """Whether the inferer can take jobs of the model. The entry of a process that was killed a
        moment ago may still exist."""
        inferer = self._inferers.get(entry.id)
        if inferer is None:
            return token_of(entry.model) == self._token
        return inferer.is_wanted and entry.started_at >= inferer.started_at

    async def _adjust(self, snapshot: _Snapshot) -> None:
        if snapshot.live.keys() & self._inferers.keys():
            for inferer in self._inferers.values():
                inferer.mark_proven()
        slots = snapshot.slots
        for inferer in self._inferers.values():
            if slots < snapshot.unfinished and not inferer.is_wanted:
                log.info("inferer_scaled_up", inferer=inferer.name, unfinished=snapshot.unfinished)
                inferer.start()
                slots += self._concurrency
        if len(self._running) > self._scale.minimum:
            # The last one that was started is stopped first.
            for inferer in reversed(self._running):
                if self._is_removable(inferer, snapshot):
                    await self._scale_down(inferer, snapshot.live[inferer.name].slots)
                    return

    def _is_removable(self, inferer: Child, snapshot: _Snapshot) -> bool:
        """Whether it has been idle for long enough, and the others have slots for all jobs."""
        entry = snapshot.live.get(inferer.name)
        if entry is None or entry.idle_since is None:
            return False
        idle_ms = milliseconds_between(entry.idle_since, snapshot.at)
        return (
            idle_ms >= self._scale.idle_s * 1000
            and snapshot.unfinished <= snapshot.slots - entry.slots
        )

    async def _scale_down(self, inferer: Child, slots: int) -> None:
        """Close its slots, then stop it, unless it has taken a job by then."""
        if await self._close_slots(inferer):
            await inferer.deactivate(STOP_TIMEOUT_S)
            log.info("inferer_scaled_down", inferer=inferer.name)
            return
        # Retried through outages of the gateway: with closed slots it would never work again.
        while not await self._set_slots(inferer, slots):
            await asyncio.sleep(POLL_S)

    async def _close_slots(self, inferer: Child) -> bool:
        """Whether its slots are closed and it is still idle."""
        if not await self._set_slots(inferer, 0):
            return False
        try:
            snapshot = await self._read()
        except (httpx2.HTTPError, msgspec.DecodeError):
            return False
        entry = snapshot.live.get(inferer.name)
        # An entry with slots is older than the command, and may miss a job taken since.
        return entry is not None and entry.slots == 0 and self._is_removable(inferer, snapshot)

    async def _set_slots(self, inferer: Child, slots: int) -> bool:
        """Set its number of slots. True if it has them, or is gone and will start with its own."""
        command = encode(ConcurrencyRequest(concurrency=slots, inferer=inferer.name))
        try:
            answer = await self._http.put("/concurrency", content=command)
            if answer.status_code == httpx2.codes.NOT_FOUND:
                return True
            report = msgspec.json.decode(answer.raise_for_status().content, type=ConcurrencyReport)
        except (httpx2.HTTPError, msgspec.DecodeError):
            return False
        return all(change.refused is None for change in report.inferers)


def _age_s(at: str) -> float:
    return (datetime.now(UTC) - parse_timestamp(at)).total_seconds()
