"""Turns of a conversation run where its beginning is in the cache, if that inferer is free."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg

from services.inferer.worker.lease import RENEW_EVERY_S
from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed
from tests.support.processes import Stack, eventually
from tests.support.raw_nats import RawNats, publication
from tests.support.workers import ended, put

SYSTEM = "You know that " + "the ships sail east and the birds fly west, " * 10
Message = dict[str, str]


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """Two inferers with one slot each."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        for _ in range(2):
            stack.start_inferer(tiny_model, INFERER_CACHE_MB="64")
        stack.wait_until_served("tiny", 2)
        yield stack


def say(stack: Stack, messages: list[Message], **options: Any) -> dict[str, Any]:
    job_id = stack.submit(messages=messages, **{"max_tokens": 4, **options})
    return stack.wait_for_end(job_id)


async def until_idle(broker: Broker) -> None:
    """Until both inferers pull."""
    while (await broker.js.consumer_info(subjects.REQUESTS, "tiny")).num_waiting != 2:
        await asyncio.sleep(0.01)


async def test_a_conversation_stays_where_it_is(stack: Stack) -> None:
    """With two inferers that are idle, each turn finds the turns before in the cache."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Go on."}]
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        inferers = []
        for turn in range(5):
            await until_idle(broker)
            job = await asyncio.to_thread(say, stack, messages)
            assert job["state"] == "SUCCESS", job
            inferers.append(job["inferer"])
            cached = job["result"]["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert bool(cached) == bool(turn)
            messages += [
                {"role": "assistant", "content": job["result"]["text"]},
                {"role": "user", "content": f"And {turn}?"},
            ]
    assert len({*inferers}) == 1, inferers


async def test_it_waits_for_nobody(stack: Stack) -> None:
    """If that inferer is busy, the turn runs on the other one at once."""
    messages = [{"role": "user", "content": SYSTEM}]
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        first = await asyncio.to_thread(say, stack, messages)
        await until_idle(broker)
        long = stack.submit(messages=messages, max_tokens=3000, seed=1)
        stack.wait_for_state(long, "STARTED")
        busy = await asyncio.to_thread(say, stack, messages)
        assert busy["state"] == "SUCCESS"
        assert stack.status(long)["state"] == "STARTED"
        assert busy["inferer"] != first["inferer"]
        stack.http.delete(f"/jobs/{long}")


async def test_a_job_offered_to_a_frozen_inferer_runs_after_its_lease(stack: Stack) -> None:
    """The frozen inferer does not answer the offer. When the lease expires, the job runs on the
    other inferer, once, as its first attempt."""
    messages = [{"role": "user", "content": SYSTEM}]
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        first = await asyncio.to_thread(say, stack, messages)
        await until_idle(broker)
        frozen = stack.inferers[int(first["inferer"].removeprefix("inferer-"))]
        other = next(inferer for inferer in stack.inferers if inferer is not frozen)
        frozen.freeze()
        # Its waiting pull gets one of them, too, and holds it until the lease expires.
        jobs = [stack.submit(messages=messages, max_tokens=2) for _ in range(2)]
        done = eventually(
            lambda: [job for job in map(stack.status, jobs) if job["state"] == "SUCCESS"] or None,
            "the one that the other inferer got",
        )
        assert {job["attempts"] for job in done} == {1}
        assert {job["inferer"] for job in done} == {f"inferer-{stack.inferers.index(other)}"}
        frozen.thaw()
        for job_id in jobs:
            assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


def test_no_inferer_has_two_jobs_at_once(stack: Stack) -> None:
    """Offers and pulls race, and no slot gets two jobs."""
    conversations = [[{"role": "user", "content": f"{number}. {SYSTEM}"}] for number in range(3)]
    jobs = []
    for number in range(60):
        messages = conversations[number % 3]
        jobs.append(stack.submit(messages=messages, max_tokens=1 + number % 9, seed=number))
        if number % 6 == 5:
            for job_id in jobs[-6:]:
                stack.wait_for_end(job_id)
    done = [stack.wait_for_end(job_id) for job_id in jobs]
    assert {job["state"] for job in done} == {"SUCCESS"}
    assert {job["attempts"] for job in done} == {1}
    for inferer in ("inferer-0", "inferer-1"):
        spans = sorted((j["started_at"], j["finished_at"]) for j in done if j["inferer"] == inferer)
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start


@pytest.fixture
async def near_ghost(stack: Stack) -> AsyncIterator[tuple[Broker, str, asyncio.Future[Msg]]]:
    """A job whose header names an inferer that gets the offer and never answers: the broker, the
    job's id, and the offer."""
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        offered: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

        async def receive(message: Msg) -> None:
            offered.set_result(message)

        await broker.nc.subscribe(subjects.handover("tiny", "ghost"), cb=receive)
        await broker.nc.flush()
        request = InferenceRequest(task="complete", prompt="hi", max_tokens=1)
        yield broker, await put(broker, request, Sluice_Nearest="ghost 0 f"), offered


async def test_a_job_that_nobody_took_comes_back(
    stack: Stack, near_ghost: tuple[Broker, str, asyncio.Future[Msg]]
) -> None:
    """Nobody answers the offer or renews the lease, so the broker redelivers the job."""
    _, job_id, offered = near_ghost
    await offered
    job = await asyncio.to_thread(stack.wait_for_end, job_id)
    assert (job["state"], job["attempts"]) == ("SUCCESS", 1)


async def test_a_job_whose_answer_was_lost_stays_where_it_is(
    stack: Stack, near_ghost: tuple[Broker, str, asyncio.Future[Msg]]
) -> None:
    """The other inferer has it and renews its lease: nobody else gets it."""
    broker, job_id, offered = near_ghost
    ack = ((await offered).headers or {})[subjects.HEADER_ACK]
    for _ in range(4):
        await asyncio.sleep(RENEW_EVERY_S)
        await broker.nc.publish(ack, Msg.Ack.Progress)
    assert stack.status(job_id)["state"] == "PENDING"
    await broker.nc.request(ack, Msg.Ack.Nak)
    assert (await asyncio.to_thread(stack.wait_for_end, job_id))["state"] == "SUCCESS"


def test_a_header_that_cannot_be_sent_on_costs_nothing(stack: Stack) -> None:
    """The broker accepts this name, and nats-py receives it but refuses to send it. The job runs
    where it was pulled."""
    job_id = new_job_id()
    headers = b"NATS/1.0\r\nSluice-Nearest: nobody 0 f\r\na@b: c\r\n\r\n"
    request = encode(InferenceRequest(task="complete", prompt="hi", max_tokens=1))
    with RawNats(stack.nats.port) as connection:
        connection.send(
            publication(subjects.request("tiny", job_id).encode(), request, b"", headers)
        )
        connection.settle()
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
    assert all(inferer.popen.poll() is None for inferer in stack.inferers)


JOB_ID = new_job_id()
OFFER = {
    subjects.HEADER_HANDED_OVER: f"infer.requests.tiny.normal.public.{JOB_ID}",
    subjects.HEADER_ACK: "$JS.ACK.REQUESTS.tiny.1.1.1.1789000000000000000.0",
    subjects.HEADER_OFFER_ENDS: "2999-01-01T00:00:00.000000Z",
    subjects.HEADER_BUSY: "0",
}
INVALID_OFFERS: dict[str, dict[str, str]] = {
    "not a request": {subjects.HEADER_HANDED_OVER: f"infer.results.tiny.{JOB_ID}"},
    "another model": {
        subjects.HEADER_HANDED_OVER: f"infer.requests.other.normal.public.{JOB_ID}",
    },
    "an ack of another model": {
        subjects.HEADER_ACK: "$JS.ACK.REQUESTS.other.1.1.1.1789000000000000000.0",
    },
    "an ack of another stream": {
        subjects.HEADER_ACK: "$JS.ACK.RESULTS.tiny.1.1.1.1789000000000000000.0",
    },
    "a subject of its choice": {subjects.HEADER_ACK: "infer.results.tiny.x"},
    "an ack without numbers": {subjects.HEADER_ACK: "$JS.ACK.REQUESTS.tiny.a.b.c.d.e"},
    "an offer that has ended": {subjects.HEADER_OFFER_ENDS: "2026-01-01T00:00:00.000000Z"},
    "an offer without a time": {subjects.HEADER_OFFER_ENDS: "soon"},
    "an offer without a number": {subjects.HEADER_BUSY: "²"},
    "an offer of one with less to do": {subjects.HEADER_BUSY: "-1"},
    "a time beyond all times": {
        subjects.HEADER_ACK: f"$JS.ACK.REQUESTS.tiny.1.1.1.{10**30}.0",
    },
}


async def offer(broker: Broker, headers: dict[str, str]) -> bytes:
    request = InferenceRequest(task="complete", prompt="hi", max_tokens=1)
    subject = subjects.handover("tiny", "inferer-0")
    return (await broker.nc.request(subject, encode(request), 5, headers=headers)).data


async def test_an_offer_that_lacks_a_header_is_refused(stack: Stack) -> None:
    """With all of them, it is taken."""
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        for missing in OFFER:
            headers = {name: value for name, value in OFFER.items() if name != missing}
            assert await offer(broker, headers) == b"refused"
        assert await offer(broker, OFFER) == b"taken"
        assert isinstance(await ended(broker, JOB_ID), Completed)


@pytest.mark.parametrize("changed", INVALID_OFFERS.values(), ids=INVALID_OFFERS)
async def test_invalid_offers_are_refused(stack: Stack, changed: dict[str, str]) -> None:
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        assert await offer(broker, OFFER | changed) == b"refused"
    assert say(stack, [{"role": "user", "content": "hi"}])["state"] == "SUCCESS"


async def test_a_fast_inferer_leaves_nothing_to_a_slow_one(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The second has a higher number as its priority: it gets a job only while the first is busy,
    and the next turn goes to the first again."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        for priority in ("0", "5"):
            stack.start_inferer(tiny_model, INFERER_CACHE_MB="64", INFERER_PRIORITY=priority)
        stack.wait_until_served("tiny", 2)
        messages = [{"role": "user", "content": SYSTEM}]
        async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
            await until_idle(broker)
            long = stack.submit(prompt="x", max_tokens=3000, seed=1)
            stack.wait_for_state(long, "STARTED")
            assert (await asyncio.to_thread(say, stack, messages))["inferer"] == "inferer-1"
            stack.http.delete(f"/jobs/{long}")
            stack.wait_for_end(long)
            await until_idle(broker)
            assert (await asyncio.to_thread(say, stack, messages))["inferer"] == "inferer-0"
