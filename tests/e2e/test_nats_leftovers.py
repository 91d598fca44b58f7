"""What callers over NATS leave behind when they ask again and again, or go away."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.wire import subjects
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, Process, Stack

LONG = {"prompt": "go on", "max_tokens": 4000, "stream": True}
KEY = {"Idempotency-Key": "again and again"}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    connection = await nats.connect(stack.nats.url)
    yield connection
    await connection.close()


async def test_500_repeats_of_one_streamed_key_leave_nothing_behind(
    stack: Stack, client: Client
) -> None:
    """They share one reader, each gets the whole answer from its first token on, and with the job
    everything that served them ends."""
    before = await _consumers(client), _descriptors(stack.gateways[0])
    inbox = client.new_inbox()
    answers = await client.subscribe(f"{inbox}.*")
    for number in range(501):
        await client.publish(
            "infer.complete", json.dumps(LONG).encode(), f"{inbox}.{number}", headers=KEY
        )
    texts: dict[str, str] = {}
    ended = set()

    async def read() -> None:
        message = await answers.next_msg(PATIENCE_S)
        body = json.loads(message.data) if message.data else None
        if body is None:
            ended.add(message.subject)
        elif "tokens" in body:
            texts[message.subject] = texts.get(message.subject, "") + "".join(body["tokens"])
        else:
            assert body["outcome"] == "cancelled"
            cancelled.add(body["id"])

    cancelled: set[str] = set()
    while len(texts) < 501:
        await read()
    assert await _consumers(client) == before[0] + 1
    job_id = stack.gateways[0].events("request_accepted")[0]["job_id"]
    await asyncio.to_thread(stack.http.delete, f"/jobs/{job_id}")
    while len(ended) < 501:
        await read()
    assert cancelled == {job_id}
    assert len(set(texts.values())) <= 2  # the last frame may have crossed with the cancel
    await _as_before(stack, client, before)


async def test_1000_callers_that_go_away_leave_nothing_behind(stack: Stack, client: Client) -> None:
    """Half of them wait with a subscription of their own and half as `request` does. When their
    connections have gone every job is cancelled, and nothing is left; one that stays is served."""
    before = await _consumers(client), _descriptors(stack.gateways[0])
    staying = asyncio.create_task(
        client.request(
            "infer.complete", b'{"prompt":"hi","max_tokens":4000}', timeout=4 * PATIENCE_S
        )
    )
    await flush(client)
    stack.gateways[0].wait_for("request_accepted")
    for _ in range(10):
        # Not nats-py's own client: its `close` loses what its `flush` has left behind.
        async with connected(BrokerSettings(url=stack.nats.url), "leaving") as broker:
            leaving = broker.nc
            wildcard = leaving.new_inbox()
            await leaving.subscribe(f"{wildcard}.*")
            for number in range(50):
                literal = leaving.new_inbox()
                await leaving.subscribe(literal)
                for inbox in (literal, f"{wildcard}.{number}"):
                    body = {**LONG, "stream": number % 2 == 0}
                    await leaving.publish("infer.complete", json.dumps(body).encode(), inbox)
            await flush(leaving)
    assert json.loads((await staying).data)["outcome"] == "completed"
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        async with asyncio.timeout(4 * PATIENCE_S):
            while (await broker.js.stream_info(subjects.RESULTS)).state.messages < 1001:
                await asyncio.sleep(0.1)
            while (await broker.js.stream_info(subjects.REQUESTS)).state.messages:
                await asyncio.sleep(0.1)
        results = await broker.direct_get_all(
            subjects.RESULTS, multi_last=[subjects.RESULTS_WILDCARD]
        )
    codes = Counter(json.loads(result.data).get("code") for result in results)
    assert codes == {"client_disconnected": 1000, None: 1}
    await _as_before(stack, client, before)


async def test_callers_that_stay_are_not_taken_for_gone(stack: Stack, client: Client) -> None:
    """They wait with a subscription of their own or as `request` does, also over a reconnect."""
    stack.inferers[0].terminate()
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    for reply_to in (inbox, f"{inbox}.x"):
        await client.publish("infer.complete", b'{"prompt":"hi","timeout_s":12}', reply_to)
    request = asyncio.create_task(
        client.request("infer.complete", b'{"prompt":"hi","timeout_s":12}', timeout=2 * PATIENCE_S)
    )
    await flush(client)
    # The second has no subscriber, and shows that the gateway has checked for long enough.
    await asyncio.to_thread(stack.gateways[0].wait_for, "job_abandoned")
    await client.force_reconnect()
    outcomes = [
        json.loads(message.data)["outcome"]
        for message in [await answers.next_msg(PATIENCE_S), await request]
    ]
    assert outcomes == ["expired", "expired"]
    assert len(stack.gateways[0].events("job_abandoned")) == 1


async def _consumers(client: Client) -> int:
    jetstream = client.jetstream()
    return sum([info.state.consumer_count for info in await jetstream.streams_info()])


def _descriptors(process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


async def _as_before(stack: Stack, client: Client, before: tuple[int, int]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await _consumers(client), _descriptors(stack.gateways[0])) != before:
            await asyncio.sleep(0.1)
