"""Whether anybody subscribes to an inbox, as the broker knows it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from services.gateway.micro.interest import Interest
from shared import subjects
from shared.broker import Broker, connected
from shared.config import BrokerSettings
from shared.topology import Topology, ensure_topology
from tests.chaos.cluster import Cluster
from tests.processes import PATIENCE_S, NatsServer


@pytest.fixture
async def caller(nats_server: NatsServer) -> AsyncIterator[Client]:
    connection = await nats.connect(nats_server.url)
    yield connection
    await connection.close()


@pytest.fixture
async def interest(broker: Broker) -> Interest:
    await ensure_topology(broker, Topology(), [])
    return Interest(broker)


async def test_who_subscribes_is_seen(interest: Interest, caller: Client, broker: Broker) -> None:
    """With a subscription to the inbox itself, or with one for all inboxes of the client; not any
    more when it has unsubscribed. Nothing is delivered to either, and nothing is left behind."""
    inbox = caller.new_inbox()
    assert not await interest.exists(inbox)
    own = await caller.subscribe(inbox)
    await caller.flush()
    assert await interest.exists(inbox)
    await own.unsubscribe()
    await caller.flush()
    assert not await interest.exists(inbox)

    await caller.subscribe(f"{inbox}.*")
    await caller.flush()
    assert await interest.exists(f"{inbox}.1")
    assert own.pending_msgs == 0
    await caller.close()
    async with asyncio.timeout(PATIENCE_S):  # the broker notices a little later
        while await interest.exists(f"{inbox}.1"):
            await asyncio.sleep(0.01)
    async with asyncio.timeout(PATIENCE_S):  # it deletes in the background
        while (await broker.js.stream_info(subjects.EVENTS)).state.consumer_count:
            await asyncio.sleep(0.01)


async def test_a_request_that_waits_is_not_disturbed(interest: Interest, caller: Client) -> None:
    """nats-py's `request` subscribes once for all requests, and takes the first message that
    carries its own token for the answer."""
    asked = await caller.subscribe("question")
    waiting = asyncio.create_task(caller.request("question", timeout=PATIENCE_S))
    question = await asked.next_msg(PATIENCE_S)
    for _ in range(5):
        assert await interest.exists(question.reply)
    await question.respond(b"answer")
    assert (await waiting).data == b"answer"


@pytest.mark.parametrize("inbox", ["_R_.a.b", "_GR_.a.b._INBOX.c"])
async def test_who_cannot_be_seen_is_taken_to_be_there(interest: Interest, inbox: str) -> None:
    """Callers of another account or cluster."""
    assert await interest.exists(inbox)


async def test_without_an_answer_everybody_is_there(
    interest: Interest, caller: Client, broker: Broker, nats_server: NatsServer
) -> None:
    """A broker that is away, or holds no EVENTS, says nothing of callers."""
    inbox = caller.new_inbox()
    await broker.js.delete_stream(subjects.EVENTS)
    assert await interest.exists(inbox)
    nats_server.process.kill()
    assert await interest.exists(inbox)


async def test_a_caller_at_another_node(tmp_path: Path) -> None:
    """Every node of a cluster knows who subscribes at the others."""
    async with Cluster(tmp_path) as cluster:
        here, there = (BrokerSettings(url=node.url) for node in cluster.nodes[:2])
        async with connected(here, "gateway") as broker, connected(there, "caller") as caller:
            await ensure_topology(broker, Topology(replicas=3), [])
            interest = Interest(broker)
            inbox = caller.nc.new_inbox()
            assert not await interest.exists(inbox)
            await caller.nc.subscribe(inbox)
            await caller.nc.subscribe(f"{inbox}.*")
            await caller.nc.flush()
            for _ in range(10):
                assert await interest.exists(inbox)
                assert await interest.exists(f"{inbox}.1")
