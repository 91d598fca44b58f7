"""Orphans on a real broker: each has one client at a time, on whatever gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.gateway.gateway import Gateway
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.orphans import Orphans
from services.gateway.settings import GatewaySettings
from shared.broker.connection import Broker, connected
from shared.broker.stored_messages import StoredMessage
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.requests import OrphanEntry
from tests.support.processes import NatsServer

BUCKET = f"KV_{subjects.IDEMPOTENCY}"
SUBMISSION = JobSubmission(model="tiny", prompt="hi")
CALLER = Caller("openai")
PATIENCE_S = 30.0


@pytest.fixture
async def gateways(queue: Broker, nats_server: NatsServer) -> AsyncIterator[list[Gateway]]:
    """Two that do nothing by themselves."""
    started = [Gateway(GatewaySettings(), BrokerSettings(url=nats_server.url)) for _ in range(2)]
    for gateway in started:
        await gateway.broker.connect()
        await gateway.fleet.refresh()
    yield started
    for gateway in started:
        await gateway.orphans.end(PATIENCE_S)
        await gateway.jobs.end(PATIENCE_S)
        await gateway.broker.close()


async def test_each_orphan_is_adopted_once(queue: Broker, gateways: list[Gateway]) -> None:
    """Of twenty retries of one request, on two gateways, ten find the ten jobs that were left, and
    no two the same. The others get none. A job that is adopted can be left and adopted again."""
    first, second = gateways
    for _ in range(2):
        left = [await first.jobs.submit(SUBMISSION, CALLER) for _ in range(10)]
        for job in left:
            first.orphans.add(job, SUBMISSION)
        await _until_there_are(queue, 10)
        retries = [gateway.orphans.adopt(SUBMISSION, CALLER) for gateway in [first, second] * 10]
        adopted = [job for job in await asyncio.gather(*retries) if job is not None]
        assert sorted(job.id for job in adopted) == sorted(job.id for job in left)
        assert not any(job.survives_disconnect for job in adopted)
        assert not await _orphans(queue)


async def test_a_retry_may_come_before_the_disconnect_is_noticed(
    queue: Broker, gateways: list[Gateway]
) -> None:
    """It finds the job all the same."""
    first, second = gateways
    job = await first.jobs.submit(SUBMISSION, CALLER)
    retry = asyncio.create_task(second.orphans.adopt(SUBMISSION, CALLER))
    await asyncio.sleep(0)
    first.orphans.add(job, SUBMISSION)
    adopted = await retry
    assert adopted is not None
    assert adopted.id == job.id


async def test_another_owner_or_request_adopts_nothing(
    queue: Broker, gateways: list[Gateway]
) -> None:
    """The answer is for who has sent the same prompt under the same name."""
    orphans = gateways[0].orphans
    orphans.add(await gateways[0].jobs.submit(SUBMISSION, CALLER), SUBMISSION)
    await _until_there_are(queue, 1)
    other = JobSubmission(model="tiny", prompt="hi", max_tokens=5)
    assert await orphans.adopt(SUBMISSION, Caller("openai", owner="other")) is None
    assert await orphans.adopt(other, CALLER) is None
    assert len(await _orphans(queue)) == 1


async def test_the_first_left_is_the_first_adopted(queue: Broker, gateways: list[Gateway]) -> None:
    """It is the one that waits furthest ahead."""
    jobs = [await gateways[0].jobs.submit(SUBMISSION, CALLER) for _ in range(3)]
    for number, job in enumerate(jobs):
        gateways[0].orphans.add(job, SUBMISSION)
        await _until_there_are(queue, number + 1)
    for job in jobs:
        adopted = await gateways[1].orphans.adopt(SUBMISSION, CALLER)
        assert adopted is not None
        assert adopted.id == job.id


async def test_overdue_orphans_are_cancelled_by_one_gateway(
    queue: Broker, gateways: list[Gateway]
) -> None:
    """Those whose time is over, and what is no entry; others stay."""
    jobs = [await gateways[0].jobs.submit(SUBMISSION, CALLER) for _ in range(4)]
    past, future = timestamp(queue.now()), "2999-01-01T00:00:00Z"
    entries = [encode(OrphanEntry(past)), b"nonsense", encode(OrphanEntry("when?"))]
    for job, entry in zip(jobs, [*entries, encode(OrphanEntry(future))], strict=True):
        await queue.js.publish(subjects.orphan("hash", job.id), entry)
    await queue.js.publish(subjects.orphan("hash", new_job_id()), entries[0])
    await queue.js.publish(subjects.orphan("hash", "not-an-id"), entries[0])
    await asyncio.gather(*(gateway.orphans.cancel_overdue() for gateway in gateways))
    for gateway in gateways:
        await gateway.jobs.end(PATIENCE_S)
    states = [(await gateways[0].jobs.brief_status(job.id)).state for job in jobs]
    assert states == ["REVOKED"] * 3 + ["PENDING"]
    (left,) = await _orphans(queue)
    assert left.subject == subjects.orphan("hash", jobs[3].id)


async def test_a_job_that_nothing_is_known_of_is_not_adopted(
    queue: Broker, gateways: list[Gateway]
) -> None:
    """The next one is."""
    orphans = gateways[0].orphans
    gone, job = [await gateways[0].jobs.submit(SUBMISSION, CALLER) for _ in range(2)]
    orphans.add(gone, SUBMISSION)
    await _until_there_are(queue, 1)
    orphans.add(job, SUBMISSION)
    await _until_there_are(queue, 2)
    request = await queue.direct_get(subjects.REQUESTS, last_by_subj=subjects.request_of(gone.id))
    assert request is not None
    await queue.delete(subjects.REQUESTS, request.sequence)
    adopted = await orphans.adopt(SUBMISSION, CALLER)
    assert adopted is not None
    assert adopted.id == job.id


async def test_an_entry_whose_confirmation_was_lost_is_stored_once(
    queue: Broker, gateways: list[Gateway], nats_server: NatsServer
) -> None:
    """It is adopted meanwhile, and does not come back, or the job would be cancelled."""
    job = await gateways[0].jobs.submit(SUBMISSION, CALLER)
    async with _losing(b'"KV_IDEMPOTENCY"', nats_server) as broker:
        orphans = Orphans(broker, gateways[0].jobs, return_s=60, patience_s=0)
        orphans.add(job, SUBMISSION)
        adopted = await gateways[1].orphans.adopt(SUBMISSION, CALLER)
        assert adopted is not None
        await orphans.end(PATIENCE_S)
    assert not await _orphans(queue)


async def test_a_job_is_adopted_although_the_answer_to_the_removal_is_lost(
    queue: Broker, gateways: list[Gateway], nats_server: NatsServer
) -> None:
    """The entry is gone: nobody else could adopt it."""
    job = await gateways[0].jobs.submit(SUBMISSION, CALLER)
    gateways[0].orphans.add(job, SUBMISSION)
    await _until_there_are(queue, 1)
    async with _losing(b'"purged"', nats_server) as broker:
        orphans = Orphans(broker, gateways[0].jobs, return_s=60, patience_s=PATIENCE_S)
        adopted = await orphans.adopt(SUBMISSION, CALLER)
    assert adopted is not None
    assert adopted.id == job.id
    assert not await _orphans(queue)


@asynccontextmanager
async def _losing(answer: bytes, server: NatsServer) -> AsyncIterator[Broker]:
    """A connection that breaks instead of delivering the first data that contains ``answer``."""
    is_lost = False

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_lost
        while data := await reader.read(65_536):
            if answer in data and not is_lost:
                is_lost = True
                break
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    relay = await asyncio.start_server(connect, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
    async with connected(BrokerSettings(url=url), "test") as broker:
        yield broker
    relay.close()
    assert is_lost


async def _orphans(queue: Broker) -> list[StoredMessage]:
    return await queue.direct_get_all(
        BUCKET, seq=1, next_by_subj=subjects.ORPHANS_WILDCARD, batch=100
    )


async def _until_there_are(queue: Broker, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(await _orphans(queue)) < count:
            await asyncio.sleep(0.01)
