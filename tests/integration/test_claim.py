"""Idempotency records on a real broker: one job for each key, released after a refusal."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest

from services.gateway.gateway import Gateway
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency_record import IdempotencyRecord, Overtaken, read_record
from services.gateway.settings import GatewaySettings
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable, KeyReused, RequestTooLarge, SluiceError, StorageShort
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.requests import IdempotencyEntry
from tests.support.processes import NatsServer

KEY = subjects.idempotency("0123456789abcdef")
OLD_ID = "01890000-0000-7000-8000-000000000000"


@pytest.fixture
async def bucket(broker: Broker) -> Broker:
    """A connection to a broker with our streams."""
    await ensure_topology(broker, Topology(), [])
    return broker


async def hold(
    bucket: Broker, record: IdempotencyRecord, job_id: str, error: Exception | None = None
) -> None:
    """Hold ``record`` while something is done that ends in ``error``."""
    async with record.held(bucket, job_id, patience_s=5):
        if error is not None:
            raise error


async def test_a_key_stands_for_one_job(bucket: Broker) -> None:
    """Of ten who saw the same free key one holds it; the others, and all that read it, see that."""
    records = await asyncio.gather(*(read_record(bucket, KEY, "d") for _ in range(10)))
    assert {(record.job_id, record.sequence) for record in records} == {(None, 0)}
    ids = [new_job_id() for _ in records]
    holding = [hold(bucket, record, job_id) for record, job_id in zip(records, ids, strict=True)]
    outcomes = await asyncio.gather(*holding, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(Overtaken) == 9
    assert (await read_record(bucket, KEY, "d")).job_id == ids[outcomes.index(None)]
    with pytest.raises(KeyReused):
        await read_record(bucket, KEY, "another")


@pytest.mark.parametrize("error", [StorageShort("full"), RequestTooLarge("large")], ids=repr)
async def test_a_refusal_frees_the_key(bucket: Broker, error: SluiceError) -> None:
    """It can be held at once, for something else."""
    with pytest.raises(type(error)):
        await hold(bucket, await read_record(bucket, KEY, "d"), new_job_id(), error)
    record = await read_record(bucket, KEY, "another")
    assert record.job_id is None
    await hold(bucket, record, new_job_id())


async def test_a_refusal_keeps_the_key_of_somebody_elses_job(bucket: Broker) -> None:
    """Who publishes it once more may be refused, where the first was only slow and is not."""
    job_id = new_job_id()
    await hold(bucket, await read_record(bucket, KEY, "d"), job_id)
    with pytest.raises(StorageShort):
        await hold(bucket, await read_record(bucket, KEY, "d"), job_id, StorageShort("full"))
    assert (await read_record(bucket, KEY, "d")).job_id == job_id


async def test_an_outage_does_not_free_the_key(bucket: Broker) -> None:
    """The job may have arrived: who comes back finds the key, and the job or its id."""
    job_id = new_job_id()
    with pytest.raises(BrokerUnavailable):
        await hold(bucket, await read_record(bucket, KEY, "d"), job_id, BrokerUnavailable("away"))
    assert (await read_record(bucket, KEY, "d")).job_id == job_id


async def test_a_refused_client_frees_only_its_own_key(bucket: Broker) -> None:
    """Not what somebody wrote in the meantime who published the same job."""
    job_id = new_job_id()
    first = await read_record(bucket, KEY, "d")
    with suppress(StorageShort):
        async with first.held(bucket, job_id, patience_s=5):
            await hold(bucket, await read_record(bucket, KEY, "d"), job_id)
            raise StorageShort("full")
    assert (await read_record(bucket, KEY, "d")).job_id == job_id


@pytest.mark.parametrize(
    "left",
    [b"", b"no entry", encode(IdempotencyEntry("x", "d")), encode(IdempotencyEntry(OLD_ID, "d"))],
    ids=["a marker", "nonsense", "no id", "the entry of a key older than a day"],
)
async def test_an_entry_that_is_no_longer_valid_is_overwritten(bucket: Broker, left: bytes) -> None:
    """It is written over."""
    await bucket.js.publish(KEY, left)
    record = await read_record(bucket, KEY, "another")
    assert (record.job_id, record.sequence) == (None, 1)
    job_id = new_job_id()
    await hold(bucket, record, job_id)
    assert (await read_record(bucket, KEY, "another")).job_id == job_id


async def test_a_job_that_is_published_while_it_is_looked_for_is_found(
    queue: Broker, nats_server: NatsServer
) -> None:
    """The gateway that was first is slow: the second one finds the key, but no job. When it checks
    whether the job ran, that has just been published and has started."""
    gateway = Gateway(GatewaySettings(), BrokerSettings(url=nats_server.url))
    await gateway.broker.connect()
    await gateway.fleet.refresh()
    submission, key = JobSubmission(model="tiny", prompt="hi"), "a key"
    await gateway.idempotency.submit(submission, Caller("http"), key)
    (bucket_entry,) = await queue.last_of_each(f"KV_{subjects.IDEMPOTENCY}", "$KV.IDEMPOTENCY.*")
    job_id = json.loads(bucket_entry.data)["id"]
    request = await queue.direct_get(subjects.REQUESTS, last_by_subj=subjects.request_of(job_id))
    assert request is not None
    await queue.delete(subjects.REQUESTS, request.sequence)
    read, reads = gateway.broker.direct_get, 0

    async def read_late(stream: str, **query: Any) -> StoredMessage | None:
        nonlocal reads
        reads += stream == subjects.STATES
        if stream == subjects.STATES and reads == 1:  # after every read for the job
            await queue.publish_stored(request.subject, request.data, {}, 5)
            event = StateEvent(state="started", attempt=1, at=timestamp(), inferer="first")
            await queue.js.publish(subjects.state("tiny", job_id), encode(event))
        return await read(stream, **query)

    vars(gateway.broker)["direct_get"] = read_late
    accepted = await gateway.idempotency.submit(submission, Caller("http"), key)
    assert (accepted.id, accepted.is_replay, accepted.state) == (job_id, True, "STARTED")
    await gateway.broker.close()
