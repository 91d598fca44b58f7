"""The streams, consumers and buckets, and the one function that makes a broker hold them."""

import asyncio
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import msgspec
import nats.js.errors
from msgspec import Struct
from nats.js.api import (
    StreamConfig,
)

from shared.broker.connection import REQUEST_TIMEOUT_S, RETRY_DELAY_S, Broker, unavailable_on_outage
from shared.broker.consumers import (
    OTHER_WIRE,
    ensure_consumers,
    list_consumers,
    priority_of_consumer,
    read_models,
)
from shared.broker.metadata import merged
from shared.broker.refusals import STORE_FULL
from shared.broker.storage import read_storage
from shared.broker.streams import Topology, first_sequence, streams
from shared.errors import BrokerUnavailable, TopologyError
from shared.model_names import is_token, token_of
from shared.wire import subjects

OLDEST_SERVER = (2, 12)
"""The first nats-server with message schedules."""

OBSTRUCTIVE = (
    "max_msgs",
    "max_bytes",
    "max_msg_size",
    "max_msgs_per_subject",
    "max_age",
    "no_ack",
    "allow_direct",
)
"""Settings that can be changed at any time, and keep jobs from being stored or read, or drop them,
where we want no bound."""

CREATED_TOGETHER_S = 60.0
NAME_IN_USE = 10058
TOO_FEW_NODES = 10005
"""No suitable peers for placement: a cluster that is still starting says so, too."""


STREAMS_PAGE = 256
"""As many as the broker lists at a time."""


class _Names(Struct, frozen=True):
    total: int = 0
    streams: list[str] | None = None


_decode_names = msgspec.json.Decoder(_Names).decode


async def missing_streams(broker: Broker, topology: Topology) -> list[str]:
    """The names of ours that the broker does not hold.

    Raises:
        BrokerUnavailable: no answer.
    """
    held: set[str] = set()
    with unavailable_on_outage(broker):
        while True:
            answer = await broker.nc.request(
                "$JS.API.STREAM.NAMES",
                msgspec.json.encode({"offset": len(held)}),
                REQUEST_TIMEOUT_S,
            )
            page = _decode_names(answer.data)
            held.update(page.streams or ())
            if not page.streams or len(held) >= page.total:
                break
    return [name for stream in streams(topology) if (name := str(stream.name)) not in held]


async def obstructed_streams(broker: Broker, topology: Topology) -> list[str]:
    """The bounds that somebody has set on streams where we want none; a line for each stream.

    Only those: gateways that want different things, such as two versions of Sluice, would otherwise
    undo each other's changes for ever.

    Raises:
        BrokerUnavailable: no answer.
    """

    def check(wanted: StreamConfig) -> str | None:
        held = configs.get(wanted.name)
        if held is None:
            return None
        unbounded = {
            name: value
            for name in OBSTRUCTIVE
            if (value := getattr(wanted, name)) <= 0 or value is True
        }
        differences = _differences(unbounded, held)
        return f"stream {wanted.name}: " + "; ".join(differences) if differences else None

    configs = await _held_configs(broker)
    found = map(check, streams(topology))
    return [difference for difference in found if difference is not None]


async def _held_configs(broker: Broker) -> dict[str | None, StreamConfig]:
    """The configurations of all streams, by name."""
    configs: dict[str | None, StreamConfig] = {}
    with unavailable_on_outage(broker):
        while True:
            page = await broker.js.streams_info(offset=len(configs))
            configs.update((info.config.name, info.config) for info in page)
            if len(page) < STREAMS_PAGE:
                return configs


async def recreated_streams(broker: Broker, topology: Topology) -> dict[str, datetime]:
    """The streams that are younger than the others, and since when: one was deleted and created
    again by a gateway, or added by an upgrade.

    Raises:
        BrokerUnavailable: no answer.
    """
    created: dict[str, datetime] = {}
    with unavailable_on_outage(broker):
        for stream in streams(topology):
            with suppress(nats.js.errors.NotFoundError):
                info = await broker.js.stream_info(str(stream.name))
                if info.created is not None:
                    created[str(stream.name)] = info.created
    oldest = min(created.values(), default=None)
    return {
        name: at
        for name, at in created.items()
        if oldest is not None and (at - oldest).total_seconds() > CREATED_TOGETHER_S
    }


async def missing_or_different(broker: Broker, topology: Topology) -> list[str]:
    """What `ensure_topology` would do to the streams; changes nothing.

    Raises:
        BrokerUnavailable: no answer.
    """
    found = []
    storage = await read_storage(broker)
    with unavailable_on_outage(broker):
        for wanted in streams(topology, storage.limit):
            try:
                held = (await broker.js.stream_info(str(wanted.name))).config
            except nats.js.errors.NotFoundError:
                found.append(f"stream {wanted.name}: missing")
                continue
            if differences := _differences(asdict(_with_metadata(wanted, held)), held):
                found.append(f"stream {wanted.name}: " + "; ".join(differences))
    return found


async def ensure_topology(broker: Broker, topology: Topology, models: list[str]) -> list[str]:
    """Create or update everything; safe to repeat and to run at several places at once.

    Returns one line for each thing that was created or changed.

    Raises:
        BrokerUnavailable: no answer.
        TopologyError: the broker is too old, holds the queues of another wire version, or something
            that cannot be changed into ours.
    """
    with unavailable_on_outage(broker):
        version = broker.nc.connected_server_version
        if (version.major, version.minor) < OLDEST_SERVER:
            wanted = ".".join(map(str, OLDEST_SERVER))
            raise TopologyError(f"nats-server {version} is too old: Sluice needs {wanted} or newer")
        await _require_own_wire(broker)
        changes: list[str] = []
        storage = await read_storage(broker)
        for stream in streams(topology, storage.limit):
            changes += await _ensure_stream(broker, stream)
        for info in await list_consumers(broker):
            if priority_of_consumer(info) is None:
                raise TopologyError(
                    f"the stream REQUESTS has a consumer {info.name} that is not Sluice's; remove "
                    f"it with: nats consumer rm REQUESTS {info.name}"
                )
        known = await read_models(broker)
        names = {token_of(model): model for model in models}
        for token, consumers in known.items():
            if is_token(names.get(token, token)):  # nobody here knows what users call it
                names[token] = consumers.name
        for token, model in sorted(names.items()):
            held = known.get(token)
            await ensure_consumers(
                broker,
                topology.ack_wait_s,
                model,
                limit=held.limit if held else 1,
                facts=held.facts if held else None,
            )
            if held is None:
                changes.append(f"consumers of {model}: created")
        return changes


async def ensure_kept(broker: Broker, topology: Topology) -> list[str]:
    """As `ensure_topology`, the stream KEPT alone: no job depends on it."""
    with unavailable_on_outage(broker):
        storage = await read_storage(broker)
        (kept,) = (one for one in streams(topology, storage.limit) if one.name == subjects.KEPT)
        return await _ensure_stream(broker, kept)


async def _require_own_wire(broker: Broker) -> None:
    try:
        held = (await broker.js.stream_info(subjects.REQUESTS)).config
    except nats.js.errors.NotFoundError:
        return
    held_subjects = held.subjects or []
    is_version_1 = subjects.REQUESTS_V1_WILDCARD in held_subjects
    if is_version_1 and not any(map(_is_request, held_subjects)):
        raise TopologyError(OTHER_WIRE)


def _is_request(subject: str) -> bool:
    """Whether requests of this version have such subjects."""
    parts = subject.split(".")
    return parts[:2] == ["infer", "requests"] and len(parts) == 6


async def _ensure_stream(broker: Broker, wanted: StreamConfig) -> list[str]:
    assert wanted.name is not None
    try:
        held = (await broker.js.stream_info(wanted.name)).config
    except nats.js.errors.NotFoundError:
        try:
            await broker.js.add_stream(
                replace(wanted, first_seq=first_sequence(wanted, broker.now()))
            )
        except nats.js.errors.ServiceUnavailableError:
            raise
        except nats.js.errors.APIError as error:
            if error.err_code == NAME_IN_USE:
                await asyncio.sleep(RETRY_DELAY_S)  # another gateway was faster
                return await _ensure_stream(broker, wanted)
            if error.err_code == TOO_FEW_NODES and wanted.name != subjects.KEPT:
                raise BrokerUnavailable(
                    f"too few nodes are up for the stream {wanted.name}: {error.description}"
                ) from error
            advice = {
                TOO_FEW_NODES: "start the other nodes",
                **dict.fromkeys(
                    STORE_FULL,
                    "free space on its disk, or let it use more (SLUICE_STORE), and restart it",
                ),
            }.get(
                error.err_code or 0, "find the conflicting stream with: nats stream ls --subjects"
            )
            if error.err_code in (TOO_FEW_NODES, *STORE_FULL) and wanted.name == subjects.KEPT:
                # No job depends on it.
                return [f"stream {wanted.name}: left out, {error.description}; {advice}"]
            raise TopologyError(
                f"the broker refuses the stream {wanted.name}: {error.description}; {advice}"
            ) from error
        await _wait_for_leader(broker, wanted.name)
        return [f"stream {wanted.name}: created"]
    wanted = _with_metadata(wanted, held)
    differences = _differences(asdict(wanted), held)
    if not differences:
        return []
    change = f"stream {wanted.name}: " + "; ".join(differences)
    try:
        await broker.js.update_stream(wanted)
    except nats.js.errors.ServiceUnavailableError:
        raise
    except nats.js.errors.APIError as error:
        if error.err_code in STORE_FULL:
            # What the stream has reserved is more than its account may have by now. It serves.
            return [f"{change}: left as it is, {error.description}"]
        raise TopologyError(
            f"{change}. The broker refuses to change it ({error.description}): rename or remove "
            f"that stream (nats stream rm {wanted.name}), or use another broker."
        ) from error
    return [change]


def _with_metadata(wanted: StreamConfig, held: StreamConfig) -> StreamConfig:
    """``wanted``, with what operators have added to the metadata of the stream."""
    return replace(wanted, metadata=merged(wanted.metadata or {}, held.metadata, set()))


def _differences(wanted: dict[str, Any], held: StreamConfig) -> list[str]:
    """The settings that differ from ``wanted``, except those that we leave to the broker."""
    holds, differences = asdict(held), []
    for name, value in wanted.items():
        if value is None or name == "name" or holds.get(name) == value:
            continue
        if not value and not holds.get(name):  # both unset, in different forms
            continue
        if name == "metadata" and value == merged({}, holds.get(name), set()):
            continue
        differences.append(f"{name} is {_plain(holds.get(name))}, should be {_plain(value)}")
    return differences


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


async def _wait_for_leader(broker: Broker, stream: str) -> None:
    """A stream on a cluster answers only once its first leader is elected."""
    for _ in range(50):
        with suppress(nats.js.errors.NotFoundError):  # the node asked does not know it yet
            info = await broker.js.stream_info(stream)
            if info.cluster is None or info.cluster.leader:
                return
        await asyncio.sleep(0.1)
