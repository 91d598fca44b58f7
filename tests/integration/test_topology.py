"""`ensure_topology` against a real broker: creates, repairs, refuses, harms nothing."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig, StreamConsumerLimits

from shared.broker.connection import Broker, connected
from shared.broker.consumers import ensure_consumers, read_models
from shared.broker.streams import Topology, streams
from shared.broker.topology import ensure_topology, obstructed_streams
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable, TopologyError
from shared.wire import subjects
from shared.wire.inferers import ModelFacts
from tests.support.processes import PATIENCE_S, NatsServer

TOPOLOGY = Topology()
FACTS = ModelFacts(n_ctx=2048, tasks=["chat", "complete"], token_bytes=12)


async def ask(broker: Broker, subject: str, **body: Any) -> dict[str, Any]:
    """The broker's own answer, in which the client has left out nothing."""
    answer = await broker.nc.request(f"$JS.API.{subject}", msgspec.json.encode(body), 5)
    found: dict[str, Any] = msgspec.json.decode(answer.data)
    assert "error" not in found, found
    return found


async def configuration(broker: Broker, stream: str) -> dict[str, Any]:
    found: dict[str, Any] = (await ask(broker, f"STREAM.INFO.{stream}"))["config"]
    return found


async def test_everything_is_created_once(broker: Broker) -> None:
    """On an empty broker all of it, one line each; the second time nothing is left to do."""
    changes = await ensure_topology(broker, TOPOLOGY, ["tiny", "other"])
    names = [str(stream.name) for stream in streams(TOPOLOGY)]
    assert changes[: len(names)] == [f"stream {name}: created" for name in names]
    assert sorted(changes[len(names) :]) == [
        "consumers of other: created",
        "consumers of tiny: created",
    ]
    assert set((await ask(broker, "STREAM.NAMES"))["streams"]) == set(names)
    assert await ensure_topology(broker, TOPOLOGY, ["tiny"]) == []


async def test_the_streams_are_as_designed(broker: Broker) -> None:
    """What no accepted job may be lost for, and what makes a result visible once."""
    await ensure_topology(broker, TOPOLOGY, [])
    requests = await configuration(broker, "REQUESTS")
    assert requests["retention"] == "workqueue"
    assert (requests["max_msgs"], requests["max_bytes"], requests["max_age"]) == (-1, -1, 0)
    assert requests["max_msgs_per_subject"] == 1
    assert requests["allow_msg_schedules"]
    results = await configuration(broker, "RESULTS")
    assert (results["discard"], results["discard_new_per_subject"]) == ("new", True)
    assert results["max_msgs_per_subject"] == 1
    assert results["republish"]["dest"] == "infer.finished.{{wildcard(1)}}.{{wildcard(2)}}"
    assert results["max_age"] == (await configuration(broker, "EVENTS"))["max_age"]
    for stream in (str(wanted.name) for wanted in streams(TOPOLOGY)):
        held = await configuration(broker, stream)
        assert (held["storage"], held["allow_direct"]) == ("file", True), stream


@pytest.mark.parametrize("priority", subjects.PRIORITIES)
async def test_the_consumers_are_as_designed(broker: Broker, priority: str) -> None:
    """One per priority; also in the fields that the client does not know."""
    await ensure_topology(broker, TOPOLOGY, ["tiny"])
    name = {"high": "tiny+high", "normal": "tiny", "low": "tiny+low"}[priority]
    held = (await ask(broker, f"CONSUMER.INFO.REQUESTS.{name}"))["config"]
    wanted = {
        "durable_name": name,
        "filter_subject": f"infer.requests.tiny.{priority}.*.*",
        "ack_policy": "explicit",
        "ack_wait": 12_000_000_000,
        "max_ack_pending": 1,
        "max_batch": 1,
        "max_waiting": 16_384,
        "max_deliver": -1,
        "priority_groups": ["g"],
        "priority_policy": "prioritized",
    }
    assert {name: held.get(name) for name in wanted} == wanted


async def test_a_pull_for_two_is_refused(broker: Broker) -> None:
    """No client can take a second job along: the broker says 409."""
    await ensure_topology(broker, TOPOLOGY, ["tiny"])
    for batch, status in ((2, "409"), (1, "404")):
        pull = {"batch": batch, "no_wait": True, "group": subjects.PRIORITY_GROUP, "priority": 0}
        answer = await broker.nc.request(
            "$JS.API.CONSUMER.MSG.NEXT.REQUESTS.tiny", msgspec.json.encode(pull), 5
        )
        assert (answer.headers or {})["Status"] == status


async def test_the_limit_and_the_facts_that_are_there_are_kept(broker: Broker) -> None:
    """A gateway that starts must not take live slots away, nor forget what the model is."""
    await ensure_topology(broker, TOPOLOGY, ["tiny"])
    await ensure_consumers(broker, TOPOLOGY.ack_wait_s, "tiny", limit=3, facts=FACTS)
    assert await ensure_topology(broker, TOPOLOGY, ["tiny"]) == []
    assert await ensure_topology(broker, TOPOLOGY, []) == []
    held = (await read_models(broker))["tiny"]
    assert {info.config.max_ack_pending for info in held.by_priority.values()} == {3}
    assert held.facts == FACTS


async def test_a_queue_of_an_earlier_version_gets_its_priorities(broker: Broker) -> None:
    """A model that has only its normal consumer keeps that, its limit and its facts."""
    await ensure_topology(broker, TOPOLOGY, ["tiny"])
    await ensure_consumers(broker, TOPOLOGY.ack_wait_s, "tiny", limit=2, facts=FACTS)
    for priority in ("high", "low"):
        await broker.js.delete_consumer(subjects.REQUESTS, f"tiny+{priority}")
    await ensure_topology(broker, TOPOLOGY, [])
    held = (await read_models(broker))["tiny"]
    assert held.is_set("tiny", 2, FACTS)


async def test_models_are_found_beyond_the_brokers_first_page(broker: Broker) -> None:
    """Three consumers each: all of them are found, page by page."""
    models = [f"model-{number}" for number in range(90)]
    await ensure_topology(broker, TOPOLOGY, models)
    assert sorted(await read_models(broker)) == sorted(models)


async def test_a_changed_setting_is_repaired_and_reported(broker: Broker) -> None:
    """One line names the stream, what it was and what it should be; messages stay."""
    await ensure_topology(broker, TOPOLOGY, [])
    await broker.js.publish(subjects.token_events("tiny", "x"), b"kept")
    wanted = _wanted(subjects.EVENTS)
    await broker.js.update_stream(wanted.evolve(max_bytes=1000, allow_direct=False))
    (change,) = await ensure_topology(broker, TOPOLOGY, [])
    assert change.startswith("stream EVENTS: ")
    assert f"max_bytes is 1000, should be {wanted.max_bytes}" in change
    assert "allow_direct is False, should be True" in change
    held = await configuration(broker, "EVENTS")
    assert (held["max_bytes"], held["allow_direct"]) == (wanted.max_bytes, True)
    assert (await broker.js.stream_info(subjects.EVENTS)).state.messages == 1


BOUNDS: list[dict[str, Any]] = [
    {"max_age": 3600.0},
    {"max_bytes": 10_000},
    {"max_msgs": 10},
    {"max_msg_size": 1},
    {"no_ack": True},
    {"allow_direct": False},
]


@pytest.mark.parametrize("bound", BOUNDS, ids=repr)
async def test_a_bound_on_the_queue_is_removed(broker: Broker, bound: dict[str, Any]) -> None:
    """REQUESTS discards the oldest: with any bound accepted jobs would vanish in silence. A gateway
    that runs sees it too."""
    await ensure_topology(broker, TOPOLOGY, [])
    assert await obstructed_streams(broker, TOPOLOGY) == []
    await broker.js.update_stream(_wanted(subjects.REQUESTS).evolve(**bound))
    (obstructed,) = await obstructed_streams(broker, TOPOLOGY)
    assert obstructed.startswith(f"stream REQUESTS: {next(iter(bound))} is ")
    (change,) = await ensure_topology(broker, TOPOLOGY, [])
    (name,) = bound
    assert change.startswith(f"stream REQUESTS: {name} is ")
    held = (await configuration(broker, "REQUESTS")).get(name)
    assert held == getattr(_wanted(subjects.REQUESTS), name) or (not held and name == "no_ack")


@pytest.mark.parametrize(
    ("stream", "bound"),
    [
        ("EVENTS", {"max_msgs_per_subject": 1}),
        ("REQUESTS", {"consumer_limits": StreamConsumerLimits(max_ack_pending=1)}),
    ],
)
async def test_other_bounds_are_removed(broker: Broker, stream: str, bound: dict[str, Any]) -> None:
    """By the gateway that starts next, or by hand."""
    await ensure_topology(broker, TOPOLOGY, [])
    await broker.js.update_stream(_wanted(stream).evolve(**bound))
    (change,) = await ensure_topology(broker, TOPOLOGY, [])
    assert change.startswith(f"stream {stream}: {next(iter(bound))} is ")
    assert await ensure_topology(broker, TOPOLOGY, []) == []


async def test_an_incompatible_stream_is_refused(broker: Broker) -> None:
    """A stream of our name that cannot become ours is left as it is; the error says why."""
    await broker.js.add_stream(
        StreamConfig(
            name="REQUESTS", subjects=["infer.requests.>"], retention=RetentionPolicy.LIMITS
        )
    )
    with pytest.raises(TopologyError) as raised:
        await ensure_topology(broker, TOPOLOGY, ["tiny"])
    assert "stream REQUESTS: " in str(raised.value)
    assert "retention is limits, should be workqueue" in str(raised.value)
    assert (await configuration(broker, "REQUESTS"))["retention"] == "limits"


@pytest.mark.parametrize(
    "foreign",
    [
        # No model's name.
        ConsumerConfig(durable_name="Archive", filter_subject="infer.requests.x.normal.*.*"),
        # Ours but for a setting that cannot be changed.
        ConsumerConfig(durable_name="archive", filter_subject="infer.requests.archive.normal.*.*"),
        # In every model's way.
        ConsumerConfig(durable_name="archive", filter_subject="infer.requests.>"),
        # It could be changed into ours, but somebody else relies on it.
        ConsumerConfig(
            durable_name="archive", filter_subject="infer.requests.>", max_waiting=16_384
        ),
    ],
)
async def test_a_foreign_consumer_is_refused(broker: Broker, foreign: ConsumerConfig) -> None:
    """The error names the consumer that is there, not one of ours, and how to remove it."""
    await ensure_topology(broker, TOPOLOGY, [])
    name = foreign.durable_name
    assert name is not None
    await broker.js.add_consumer(subjects.REQUESTS, foreign)
    models = [f"model-{number}" for number in range(12)]
    with pytest.raises(TopologyError, match=f"nats consumer rm REQUESTS {name}$"):
        await ensure_topology(broker, TOPOLOGY, models)
    info = await broker.js.consumer_info(subjects.REQUESTS, name)
    assert info.config.filter_subject == foreign.filter_subject


async def test_a_smaller_storage_limit_leaves_the_streams_as_they_are(
    broker: Broker, nats_server: NatsServer
) -> None:
    """What the events have reserved is more than all of it: they keep it, and all is served."""
    await ensure_topology(broker, TOPOLOGY, ["tiny"])
    nats_server.process.terminate()
    nats_server.store = "500MB"
    nats_server.start()
    (printed,) = await _when_it_answers(broker)
    assert printed.startswith("stream EVENTS: max_bytes is 1073741824, should be 52428800: left as")
    await broker.js.publish("infer.events.tiny.1.state", b"{}")


async def test_an_account_without_storage_is_refused_with_a_reason(tmp_path: Path) -> None:
    """What to do about it is said, whoever has to make the streams."""
    with NatsServer(tmp_path / "nats", store="0") as server:
        async with connected(BrokerSettings(url=server.url), "test") as broker:
            with pytest.raises(TopologyError, match=r"refuses the stream REQUESTS: .*; free space"):
                await ensure_topology(broker, TOPOLOGY, [])


async def test_consumers_are_unavailable_while_the_broker_is_away(
    broker: Broker, nats_server: NatsServer
) -> None:
    """An outage like any other, which a gateway outlives; so is a stream that is not there yet."""
    with pytest.raises(BrokerUnavailable):
        await ensure_consumers(broker, 12, "m", 1, None)
    await ensure_topology(broker, Topology(), ["m"])
    nats_server.process.kill()
    with pytest.raises(BrokerUnavailable):
        await ensure_consumers(broker, 12, "m", 1, None)


async def test_five_gateways_at_once_create_everything_once(broker: Broker) -> None:
    """Several gateways that start together on an empty broker, and then on a full one."""
    for _ in range(2):
        await asyncio.gather(*(ensure_topology(broker, TOPOLOGY, ["tiny"]) for _ in range(5)))
        assert await ensure_topology(broker, TOPOLOGY, ["tiny"]) == []


async def _when_it_answers(broker: Broker) -> list[str]:
    """What `ensure_topology` has changed after a restart of the broker."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await ensure_topology(broker, TOPOLOGY, [])
            except BrokerUnavailable:
                await asyncio.sleep(0.05)


def _wanted(name: str) -> StreamConfig:
    (found,) = (stream for stream in streams(TOPOLOGY) if stream.name == name)
    return found
