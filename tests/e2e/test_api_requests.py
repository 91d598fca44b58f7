"""What a deployment without jobs asks of the broker's API: whoever watches its advisories sees what
people do, and not what gateways do all the time."""

import asyncio
import json

import nats
from nats.aio.msg import Msg

from shared.broker.connection import connected
from shared.broker.consumers import ensure_consumers, read_model
from shared.broker.streams import Topology
from shared.config import BrokerSettings
from shared.wire import subjects
from tests.support.processes import PATIENCE_S, Stack

QUIET_S = 5.0
WATCHED_S = 10.0
MOST_REQUESTS = 10
"""All that a gateway reads in 30 s may fall into the time that is watched."""


async def test_an_idle_gateway_hardly_uses_the_api(stack: Stack) -> None:
    """After a job. It lists no consumers, and everything together is a few requests, where 18 were
    made every two seconds."""
    await asyncio.to_thread(_run_a_job, stack)
    seen: list[str] = []
    client = await nats.connect(stack.nats.url)

    async def note(message: Msg) -> None:
        seen.append(json.loads(message.data)["subject"])

    await client.subscribe("$JS.EVENT.ADVISORY.API", cb=note)
    async with asyncio.timeout(PATIENCE_S):
        count = -1
        while count != len(seen):
            count = len(seen)
            await asyncio.sleep(QUIET_S)
    del seen[:]
    await asyncio.sleep(WATCHED_S)
    await client.close()
    listing = ("$JS.API.CONSUMER.LIST", "$JS.API.CONSUMER.NAMES")
    assert not [subject for subject in seen if subject.startswith(listing)]
    assert len(seen) <= MOST_REQUESTS, seen


async def test_a_consumer_deleted_while_nothing_happens_is_created_again(stack: Stack) -> None:
    """Before a job comes."""
    await asyncio.to_thread(_run_a_job, stack)
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        for name in ("tiny", "tiny+low"):
            await broker.js.delete_consumer(subjects.REQUESTS, name)
        held: list[str] = []
        async with asyncio.timeout(10):
            while set(held) != {"tiny", "tiny+high", "tiny+low"}:
                await asyncio.sleep(0.1)
                held = [info.name for info in await broker.js.consumers_info(subjects.REQUESTS)]


async def test_a_limit_that_was_changed_while_nothing_happened_is_set_back(stack: Stack) -> None:
    """At the latest once a job comes: the broker does not announce such a change."""
    await asyncio.to_thread(_run_a_job, stack)
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        await ensure_consumers(broker, Topology().ack_wait_s, "tiny", limit=7, facts=None)
        await asyncio.to_thread(_run_a_job, stack)
        async with asyncio.timeout(10):
            while True:
                model = await read_model(broker, "tiny")
                if model is not None and (model.limit, model.facts is None) == (1, False):
                    break
                await asyncio.sleep(0.1)


def _run_a_job(stack: Stack) -> None:
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
