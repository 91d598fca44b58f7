"""Which models exist, which inferers live, and the limit that follows from it.

Everything is read from the broker and nothing is kept anywhere else, so any number of gateways may
do it at once.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

import msgspec
from nats.aio.msg import Msg

from shared.broker.connection import Broker, unavailable_on_outage
from shared.broker.consumers import ModelConsumers, ensure_consumers, read_model, read_models
from shared.broker.inferers import Live, find_overlaps, read_inferers
from shared.broker.refusals import TRANSIENT
from shared.broker.streams import Topology
from shared.errors import InvalidRequest, TopologyError, UnknownInferer, UnknownModel
from shared.logs import logger
from shared.model_names import MAX_NAME_CHARS, NAME_RULE, is_name, token_of
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import ConcurrencyReport, ConcurrencyRequest, FleetReport
from shared.wire.codecs import decode_concurrency_change, decode_inferer_entry, encode
from shared.wire.inferers import (
    ConcurrencyChange,
    InfererEntry,
    ModelFacts,
    OverlapNotice,
    OverlappingInferer,
    SetConcurrency,
)
from shared.wire.nearest import NearestInferer

REFRESH_S = 2.0
READ_IDLE_EVERY_S = 30.0
"""The broker does not announce that somebody has changed a consumer."""
COMMAND_TIMEOUT_S = 10.0
"""How long an inferer may take to move into a larger context."""

log = logger()


class Fleet:
    """The models and inferers as of the last refresh. The inferers, and the queues of models that
    have jobs, are read every few seconds; those of other models when something may have changed,
    and every `READ_IDLE_EVERY_S`."""

    def __init__(self, broker: Broker, topology: Topology, expected: list[str]) -> None:
        """``expected`` are the models that this gateway is to serve before any inferer comes."""
        self._broker = broker
        self._topology = topology
        self._expected = expected
        self._changed = asyncio.Event()
        self._is_outdated = True
        """Whether an inferer or a consumer has come or gone since all consumers were read."""
        self._all_read_at = -math.inf
        self._touched: set[str] = set()
        """The tokens of models that got a job, or another limit, since their consumers were
        read."""
        self.is_active = True
        """Whether anything had changed, or a model had jobs, at the last refresh."""
        self._refreshing = asyncio.Lock()
        self.models: dict[str, ModelConsumers] = {}
        """By the model's token."""
        self._live: dict[str, dict[str, Live]] = {}
        """By the model's token and their ids."""
        self._reading_queues = asyncio.Lock()
        self._next_reading: asyncio.Task[dict[str, ModelConsumers]] | None = None
        """The next reading of the queues; None once it has started."""
        self._restarted_at: dict[str, float] = {}
        """When an inferer of the model was last seen to have started again (monotonic)."""
        self._overlaps: dict[tuple[str, str], list[str]] = {}
        """The last notice to each inferer, by its model's token and its id."""
        self._on_refresh: list[Callable[[dict[str, ModelConsumers]], None]] = []
        broker.on_reconnect(self._note_change)

    def on_refresh(self, callback: Callable[[dict[str, ModelConsumers]], None]) -> None:
        """Call ``callback`` with the models' consumers after each refresh."""
        self._on_refresh.append(callback)

    def inferers(self, model: str) -> list[InfererEntry]:
        """Those of the model with this token."""
        return [one.entry for one in self.live(model)]

    def live(self, model: str) -> list[Live]:
        """The same with their heartbeats."""
        return list(self._live.get(model, {}).values())

    def nearest(self, model: str, found: Sequence[str]) -> NearestInferer | None:
        """Which inferer of the model with this token has computed the longest prefix of a prompt
        with the fingerprints ``found``; None if none has computed any. Among equals, one with a
        free slot at its last heartbeat comes first, then the smallest `INFERER_PRIORITY`."""
        lengths = {fingerprint: length for length, fingerprint in enumerate(found)}
        best = None
        for entry in self.inferers(model):
            known = lengths.keys() & entry.prefixes
            if known:
                longest = max(known, key=lengths.__getitem__)
                is_full = len(entry.jobs) >= entry.slots
                rank = lengths[longest], not is_full, -entry.priority
                if best is None or rank > best[0]:
                    best = rank, NearestInferer(entry.id, entry.priority, longest)
        return best[1] if best else None

    async def watch(self) -> None:
        """Follow the inferers and consumers that come and go."""
        await self._broker.nc.subscribe(subjects.INFERERS_WILDCARD, cb=self._on_entry)
        for advisories in subjects.CONSUMER_ADVISORIES:
            await self._broker.nc.subscribe(advisories, cb=self._on_advisory)

    def on_accepted(self, model: str) -> None:
        """The model with this token got a job; its consumers need not be known yet."""
        self._touched.add(model)

    async def queues(self) -> dict[str, ModelConsumers]:
        """The models' consumers by token, as they are now: callers that come while the queues are
        being read share the next reading. A model that has no queue yet is left out.

        Raises:
            BrokerUnavailable: no answer.
        """
        if self._next_reading is None:
            self._next_reading = asyncio.create_task(self._read_queues(), name="read the queues")
            # All that wait for it may be cancelled.
            self._next_reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._next_reading)

    async def _read_queues(self) -> dict[str, ModelConsumers]:
        async with self._reading_queues:
            self._next_reading = None
            return await read_models(self._broker)

    async def change(self) -> None:
        """Wait until an inferer or a consumer has come or gone, a few seconds at most."""
        try:
            async with asyncio.timeout(REFRESH_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def refresh(self) -> None:
        """Read entries and consumers, and adjust every consumer to its inferers.

        Raises:
            BrokerUnavailable: no answer, or what should be there is not.
        """
        # One at a time here; and the entries after the limits, so that a limit that somebody has
        # just raised is not compared with entries from before.
        async with self._refreshing:
            await self._read_all()

    async def follow(self) -> None:
        """Like `refresh`, but read only the consumers of models that have jobs, or got one since
        their consumers were read, and now and then those of each known model. If an inferer or a
        consumer has come or gone, read all.

        Raises:
            BrokerUnavailable: no answer, or what should be there is not.
        """
        async with self._refreshing:
            if self._is_outdated:
                await self._read_all()
                self.is_active = True
            else:
                await self._read_some()

    async def _read_all(self) -> None:
        self._is_outdated = False  # set again by what changes meanwhile
        try:
            self._touched.clear()
            self._all_read_at = time.monotonic()
            await self._adjust_all(await read_models(self._broker))
        except BaseException:  # a cancellation, too
            self._is_outdated = True
            raise

    async def _read_some(self) -> None:
        tokens = [token for token, model in self.models.items() if self._is_active(model)]
        self.is_active = bool(tokens)
        self._touched.clear()
        if time.monotonic() - self._all_read_at > READ_IDLE_EVERY_S:
            self._all_read_at = time.monotonic()
            tokens = list(self.models)
        found = await asyncio.gather(*(read_model(self._broker, token) for token in tokens))
        models = self.models | dict(zip(tokens, found, strict=True))
        await self._adjust_all({token: model for token, model in models.items() if model})

    def _is_active(self, model: ModelConsumers) -> bool:
        return bool(
            model.token in self._touched
            or model.waiting
            or model.in_flight
            # Such as a retry, which is not announced.
            or any(entry.jobs for entry in self.inferers(model.token))
        )

    async def _adjust_all(self, models: dict[str, ModelConsumers]) -> None:
        """Read the entries, and adjust every consumer of ``models``, as just read, to its
        inferers."""
        found, some_died = await read_inferers(self._broker)
        live: dict[str, dict[str, Live]] = {}
        for one in found:
            live.setdefault(token_of(one.entry.model), {})[one.entry.id] = one
        self._note_restarts(live)
        for model in sorted(models.keys() | live.keys()):
            inferers = [one.entry for one in live.get(model, {}).values()]
            may_have_died = some_died or self._has_restarted(model)
            try:
                await self._adjust(model, inferers, models.get(model), may_have_died)
            except TopologyError as error:
                log.error("limit_not_set", model=model, error=error.message)
        if live.keys() - models.keys():
            models = await read_models(self._broker)
        self.models, self._live = models, live
        for callback in self._on_refresh:
            callback(models)
        await self._report_overlaps([one.entry for one in found])

    def _note_restarts(self, live: dict[str, dict[str, Live]]) -> None:
        """An inferer that was killed and starts again under its id leaves no trace in the bucket
        but another start."""
        for model, inferers in live.items():
            known = self._live.get(model, {})
            if any(
                name in known and known[name].entry.started_at != one.entry.started_at
                for name, one in inferers.items()
            ):
                self._restarted_at[model] = time.monotonic()

    def _has_restarted(self, model: str) -> bool:
        """Whether an inferer restarted so recently that its old process may still hold a job."""
        since_s = time.monotonic() - self._restarted_at.get(model, -math.inf)
        return since_s < self._topology.ack_wait_s + 2 * REFRESH_S

    async def _report_overlaps(self, entries: list[InfererEntry]) -> None:
        """Notify each inferer of those that share its CPUs, whenever these have changed."""
        by_id = {entry.id: entry for entry in entries}
        found = find_overlaps(entries)
        overlaps = {}
        for entry in entries:
            key = token_of(entry.model), entry.id
            overlaps[key] = others = sorted(found[entry.id])
            if others == self._overlaps.get(key, []):
                continue
            notice = OverlapNotice(
                [
                    OverlappingInferer(other, by_id[other].threads, by_id[other].cpus)
                    for other in others
                ]
            )
            with unavailable_on_outage(self._broker):
                await self._broker.nc.publish(subjects.overlap(*key), encode(notice))
        self._overlaps = overlaps

    def runs(self, job_id: str) -> bool:
        """Whether an inferer says in its entry that it runs the job."""
        live = (one for inferers in self._live.values() for one in inferers.values())
        return any(job.id == job_id for one in live for job in one.entry.jobs)

    async def report(self) -> FleetReport:
        """Every live inferer, as it is now, with the inferers that compete for its CPUs.

        Raises:
            BrokerUnavailable: no answer.
        """
        live, _ = await read_inferers(self._broker)
        entries = [one.entry for one in live]
        overlaps = find_overlaps(entries)
        return FleetReport(
            [
                msgspec.structs.replace(entry, overlaps=overlaps[entry.id], prefixes=[])
                for entry in entries
            ],
            at=timestamp(self._broker.now()),
        )

    async def set_concurrency(self, wanted: ConcurrencyRequest) -> ConcurrencyReport:
        """Set the number of slots of inferers, and adjust the limits.

        Raises:
            UnknownModel: the model's name is not valid.
            UnknownInferer: no live inferer matches.
            BrokerUnavailable: no answer of the broker.
        """
        model = None if wanted.model is None else _token_of_valid(wanted.model)
        live, _ = await read_inferers(self._broker)
        entries = [
            one.entry
            for one in live
            if model in (None, token_of(one.entry.model)) and wanted.inferer in (None, one.entry.id)
        ]
        if not entries:
            asked = [f"inferer {wanted.inferer!r}"] if wanted.inferer else ["inferer"]
            asked += [f"of the model {wanted.model!r}"] if wanted.model else []
            known = ", ".join(f"{one.entry.id} of {one.entry.model}" for one in live)
            raise UnknownInferer(
                f"no {' '.join(asked)} is live; "
                + (f"the live inferers are {known}" if known else "start one")
            )
        command = encode(SetConcurrency(wanted.concurrency))
        changes = await asyncio.gather(*(self._command(entry, command) for entry in entries))
        await self.refresh()
        return ConcurrencyReport(list(changes))

    async def _command(self, entry: InfererEntry, command: bytes) -> ConcurrencyChange:
        subject = subjects.control(entry.model, entry.id)
        try:
            answer = await self._broker.nc.request(subject, command, COMMAND_TIMEOUT_S)
            change = decode_concurrency_change.read(answer.data, subject)
            refused = "its answer cannot be read; see this gateway's log"
        except TRANSIENT:
            change, refused = None, "it does not answer; see: sluice doctor"
        return change or ConcurrencyChange(
            inferer=entry.id,
            model=entry.model,
            before=entry.slots,
            concurrency=entry.slots,
            refused=refused,
        )

    async def model(self, name: str) -> ModelConsumers:
        """The model's consumers as they are now.

        Raises:
            UnknownModel: there are none.
            BrokerUnavailable: no answer.
        """
        model = await read_model(self._broker, _token_of_valid(name))
        if model is None:
            known = ", ".join(self._names()) or "none yet: start an inferer"
            raise UnknownModel(f"no model {name!r} is served; known: {known}")
        return model

    async def choose(self, name: str | None) -> ModelConsumers:
        """The model to use, as of the last refresh; ``name`` may be left out if only one is served.

        Raises:
            UnknownModel: no such model, or none at all.
            InvalidRequest: several are served and none was named.
            BrokerUnavailable: no answer.
        """
        if name is None:
            name = self._only_model()
        return self.models.get(_token_of_valid(name)) or await self.model(name)

    def _only_model(self) -> str:
        live = set(self._live)
        if len(self._expected) > 1:
            # What a request means must not depend on which of them has an inferer at the moment.
            live |= {token_of(name) for name in self._expected}
        for candidates in (list(self.models), list(live), self._expected):
            if len(candidates) == 1:
                return candidates[0]
        if not self.models:
            raise UnknownModel("no model is served yet: start an inferer")
        raise InvalidRequest(
            f"model: several are served; name one of {', '.join(self._names())}", "model"
        )

    def _names(self) -> list[str]:
        return sorted(model.name for model in self.models.values())

    async def _adjust(
        self,
        model: str,
        inferers: list[InfererEntry],
        held: ModelConsumers | None,
        may_have_died: bool,
    ) -> None:
        """Set the limit and the facts of the model. ``may_have_died``: an inferer may have."""
        in_flight = held.in_flight if held and may_have_died else 0
        limit = limit_of(inferers, in_flight)
        name, facts = (held.name, held.facts) if held else (model, None)
        if inferers:
            newest = max(inferers, key=lambda inferer: inferer.started_at)
            name = newest.model
            facts = ModelFacts.of(inferers)
        if held is not None and held.is_set(name, limit, facts):
            return
        await ensure_consumers(self._broker, self._topology.ack_wait_s, name, limit, facts)
        self._touched.add(model)
        log.info("limit_set", model=name, limit=limit, inferers=len(inferers))

    async def _on_entry(self, message: Msg) -> None:
        """Called for every heartbeat. If an inferer joins, leaves or changes its slots, all entries
        are read again; otherwise the entry replaces the known one."""
        model, inferer_id = subjects.model_and_id(message.subject)
        entry = None
        if message.data:
            entry = decode_inferer_entry.read(message.data, message.subject)
        live = self._live.get(model, {})
        known = live.get(inferer_id)
        if entry is not None and known is not None and _is_same(entry, known.entry):
            live[inferer_id] = Live(entry, timestamp(self._broker.now()))
        else:
            self._note_change()

    async def _on_advisory(self, message: Msg) -> None:
        self._note_change()

    def _note_change(self) -> None:
        self._is_outdated = True
        self._changed.set()


def _token_of_valid(name: str) -> str:
    """The token of a model that a client names.

    Raises:
        UnknownModel: no model can have this name.
    """
    if not is_name(name):
        raise UnknownModel(f"{name[:MAX_NAME_CHARS]!r} is not a valid model name: give {NAME_RULE}")
    return token_of(name)


def _is_same(entry: InfererEntry, known: InfererEntry) -> bool:
    """Whether an entry is that of the same start of an inferer, with as many slots."""
    return (entry.id, entry.model, entry.slots, entry.started_at) == (
        known.id,
        known.model,
        known.slots,
        known.started_at,
    )


def limit_of(inferers: list[InfererEntry], in_flight: int) -> int:
    """One job for each live slot, and at least one. The job of a dead inferer counts until its
    lease has expired; so that live slots stay usable, the limit is one higher for each job
    ``in_flight`` that no inferer reports."""
    slots = sum(inferer.slots for inferer in inferers)
    reported = sum(len(inferer.jobs) for inferer in inferers)
    return max(1, slots + max(0, in_flight - reported))
