"""Whether anybody subscribes to an inbox, as the broker knows it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from services.gateway.micro.interest import Interest
from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings
from tests.chaos.cluster import Cluster
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, NatsServer


@pytest.fixture
async def caller(nats_server: NatsServer) -> AsyncIterator[Client]:
    # Not nats-py's own client: its `flush` does not wait for a subscription.
    async with connected(BrokerSettings(url=nats_server.url), "caller") as broker:
        yield broker.nc


@pytest.fixture
def interest(broker: Broker) -> Interest:
    return Interest(broker)


async def test_a_subscriber_is_found(interest: Interest, caller: Client, broker: Broker) -> None:
    """With a subscription to the inbox itself, or with one of any form for all inboxes of the
    client; not any more when it has unsubscribed. Nothing is delivered to either, and nothing is
    left behind."""
    inbox = caller.new_inbox()
    assert not await interest.exists(inbox)
    subscriptions = len(broker.nc._subs)  # one for all reports
    own = await caller.subscribe(inbox)
    await flush(caller)
    assert await interest.exists(inbox)
    await own.unsubscribe()
    await flush(caller)
    assert not await interest.exists(inbox)

    all_of_them = [await caller.subscribe(f"{inbox}.{wildcard}") for wildcard in "*>"]
    for one in all_of_them:
        await flush(caller)
        assert await interest.exists(f"{inbox}.1")
        await one.unsubscribe()
    await flush(caller)
    assert not await interest.exists(f"{inbox}.1")
    assert [one.pending_msgs for one in (own, *all_of_them)] == [0, 0, 0]

    await caller.subscribe(inbox)
    await flush(caller)
    assert await interest.exists(inbox)
    await caller.close()
    async with asyncio.timeout(PATIENCE_S):  # the broker notices a little later
        while await interest.exists(inbox):
            await asyncio.sleep(0.01)
    assert len(broker.nc._subs) == subscriptions
    assert not broker.nc._inboxes


async def test_a_caller_that_reconnects_is_not_given_up(
    interest: Interest, nats_server: NatsServer
) -> None:
    """A client that reconnects is away for 2 s by default. One that never comes is lost."""
    async with await nats.connect(nats_server.url) as caller:
        inbox = caller.new_inbox()
        await caller.subscribe(inbox)
        await caller.force_reconnect()
        watching = asyncio.create_task(interest.lost(inbox))
        assert not caller.is_connected
        async with asyncio.timeout(PATIENCE_S):
            await interest.lost(caller.new_inbox())
        assert not watching.done()
        watching.cancel()


async def test_after_a_reconnect_the_absence_counts_anew(
    interest: Interest, caller: Client, nats_server: NatsServer
) -> None:
    """Callers may have lost their connections with ours, and come back later than we do."""
    checked = asyncio.Event()

    class Observed(Interest):
        async def exists(self, inbox: str) -> bool:
            found = await super().exists(inbox)
            checked.set()
            return found

    inbox = caller.new_inbox()
    async with connected(BrokerSettings(url=nats_server.url), "gateway") as ours:
        observed = asyncio.create_task(Observed(ours).lost(inbox))
        undisturbed = asyncio.create_task(interest.lost(inbox))
        async with asyncio.timeout(PATIENCE_S):
            await checked.wait()
            await ours.nc.force_reconnect()
            await undisturbed
            assert not observed.done()
            await observed


@pytest.mark.parametrize(
    ("subscription", "is_heard"),
    [
        ("_INBOX.>", True),
        ("_INBOX.id.>", True),
        ("_INBOX.id.part.>", True),
        ("_INBOX.*.part.7", True),
        ("_INBOX.id.*.7", True),
        ("_INBOX.id.part.*", True),
        ("_INBOX.*.*.*", True),
        ("_INBOX.*.part.*", True),
        ("_INBOX.id.part.7", True),
        ("_INBOX.*", False),
        ("_INBOX.*.*.7.*", False),
        ("_INBOX.id.part.7.>", False),
        ("_INBOX.id.*.8", False),
        ("_INBOX.*.other.7", False),
    ],
)
async def test_every_subscription_that_matches_counts(
    interest: Interest, caller: Client, subscription: str, is_heard: bool
) -> None:
    """As NATS compares subjects: ``*`` is one token, ``>`` is one or more at the end."""
    await caller.subscribe(subscription)
    await flush(caller)
    assert await interest.exists("_INBOX.id.part.7") == is_heard


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
async def test_a_caller_that_cannot_be_seen_is_taken_to_be_there(
    interest: Interest, inbox: str
) -> None:
    """Callers of another account or cluster."""
    assert await interest.exists(inbox)


async def test_without_an_answer_every_caller_is_taken_to_be_there(
    interest: Interest, caller: Client, nats_server: NatsServer
) -> None:
    """A broker that is away says nothing of callers."""
    inbox = caller.new_inbox()
    assert not await interest.exists(inbox)
    nats_server.process.kill()
    assert await interest.exists(inbox)


async def test_a_caller_at_another_node_is_found(tmp_path: Path) -> None:
    """Every node of a cluster knows who subscribes at the others."""
    async with Cluster(tmp_path) as cluster:
        here, there = (BrokerSettings(url=node.url) for node in cluster.nodes[:2])
        async with connected(here, "gateway") as broker, connected(there, "caller") as caller:
            interest = Interest(broker)
            inbox = caller.nc.new_inbox()
            assert not await interest.exists(inbox)
            await caller.nc.subscribe(inbox)
            await caller.nc.subscribe(f"{inbox}.*")
            await flush(caller.nc)
            async with asyncio.timeout(PATIENCE_S):  # the nodes notify each other
                while not (await interest.exists(inbox) and await interest.exists(f"{inbox}.1")):
                    await asyncio.sleep(0.01)
            for _ in range(10):
                assert await interest.exists(inbox)
                assert await interest.exists(f"{inbox}.1")
