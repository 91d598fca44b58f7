"""A gateway that stops while thousands of NATS requests are on their way."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, Stack

REQUESTS = 3000
SUBMIT = b'{"prompt":"hi","max_tokens":1}'


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    connection = await nats.connect(stack.nats.url)
    yield connection
    await connection.close()


async def _submit_while(stack: Stack, client: Client) -> list[Msg]:
    """The answers to `REQUESTS` submits, in the midst of which the first of the gateways stops."""
    inbox = client.new_inbox()
    answers = await client.subscribe(f"{inbox}.*")
    for number in range(REQUESTS):
        await client.publish("infer.submit", SUBMIT, reply=f"{inbox}.{number}")
        if number == REQUESTS // 3:
            await flush(client)
            stack.gateways[0].popen.terminate()
    received = [await answers.next_msg(PATIENCE_S) for _ in range(REQUESTS)]
    assert await asyncio.to_thread(stack.gateways[0].wait) == 0
    assert len({message.subject for message in received}) == REQUESTS
    return received


def _kinds(received: list[Msg]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for message in received:
        headers = message.headers or {}
        kinds[headers.get("Nats-Service-Error-Code") or headers.get("Status") or "accepted"] += 1
    return kinds


async def test_no_request_is_lost_when_one_of_three_gateways_stops(
    stack: Stack, client: Client
) -> None:
    """Nobody notices: each of some thousand requests is accepted, by it or by another one, and each
    accepted job has exactly one result."""
    for _ in range(2):
        stack.start_gateway()
    for gateway in stack.gateways:
        gateway.wait_for("gateway_ready")
    received = await _submit_while(stack, client)
    assert _kinds(received) == {"accepted": REQUESTS}
    by_first = {event["job_id"] for event in stack.gateways[0].events("request_accepted")}
    assert by_first
    await _each_has_one_result(client, [json.loads(message.data)["id"] for message in received])


async def test_requests_are_answered_when_the_only_gateway_stops(
    stack: Stack, client: Client
) -> None:
    """Each request is answered, refused with 503, or gets the broker's "no responders"; and
    what was accepted is there."""
    received = await _submit_while(stack, client)
    kinds = _kinds(received)
    assert set(kinds) <= {"accepted", "503"}
    accepted = [json.loads(message.data)["id"] for message in received if not message.headers]
    assert len(accepted) >= REQUESTS // 3
    jetstream = client.jetstream()
    held: set[str] = set()
    for stream in ("REQUESTS", "RESULTS"):  # in this order a job is in one of them at least
        state = (await jetstream.stream_info(stream, subjects_filter=">")).state
        held |= {subject.rpartition(".")[2] for subject in state.subjects or {}}
    assert held >= set(accepted)


async def _each_has_one_result(client: Client, job_ids: list[str]) -> None:
    assert len(set(job_ids)) == len(job_ids)
    jetstream = client.jetstream()
    async with asyncio.timeout(4 * PATIENCE_S):
        while (await jetstream.stream_info("REQUESTS")).state.messages:
            await asyncio.sleep(0.2)
    results = (await jetstream.stream_info("RESULTS", subjects_filter="infer.results.tiny.*")).state
    assert results.messages == len(job_ids)
    assert set(results.subjects or {}) == {f"infer.results.tiny.{job_id}" for job_id in job_ids}
