"""The list of jobs follows the streams: through restarts of the broker, deletions, and streams that
are replaced."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from services.gateway.listing import reader
from services.gateway.listing.reader import JobLister
from shared.broker.connection import Broker
from shared.broker.results import store_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.listing import JobPage, JobQuery
from shared.wire.requests import InferenceRequest
from shared.wire.results import Failed
from tests.support.processes import PATIENCE_S, NatsServer

REQUEST = encode(InferenceRequest(task="complete", prompt="x"))


@asynccontextmanager
async def listing(broker: Broker, max_jobs: int = 1000) -> AsyncIterator[JobLister]:
    lister = JobLister(broker, max_jobs)
    async with lister.running():
        await until(lambda: _is_complete(lister))
        yield lister


async def _is_complete(lister: JobLister) -> bool:
    return lister.is_complete


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await is_so():
            await asyncio.sleep(0.05)


async def accept(broker: Broker) -> str:
    job_id = new_job_id(broker.now())
    await broker.publish_stored(subjects.request("tiny", job_id), REQUEST, {}, PATIENCE_S)
    return job_id


async def end(broker: Broker, job_id: str) -> None:
    result = Failed(
        id=job_id,
        model="tiny",
        attempt=1,
        queued_at=timestamp(),
        finished_at=timestamp(),
        code="model_error",
        message="",
    )
    await store_result(broker, result, PATIENCE_S)


async def states(lister: JobLister) -> dict[str, str]:
    page: JobPage = await lister.page(JobQuery(limit=200))
    return {job.id: job.state for job in page.jobs}


async def test_what_was_stored_a_moment_ago_is_listed(queue: Broker) -> None:
    """Without waiting for the next reading in the background; by one that starts later too, states
    included."""
    async with listing(queue) as lister:
        waiting, running, ended = [await accept(queue) for _ in range(3)]
        assert set((await states(lister)).values()) == {"PENDING"}
        started = StateEvent(state="started", attempt=1, at=timestamp(), inferer="a")
        await queue.publish_stored(subjects.state("tiny", running), encode(started), {}, 5)
        await end(queue, ended)
        expected = {waiting: "PENDING", running: "STARTED", ended: "FAILURE"}
        assert await states(lister) == expected
    async with listing(queue) as later:
        assert await states(later) == expected


async def test_a_retry_that_is_scheduled_is_listed_by_one_that_starts_later(queue: Broker) -> None:
    """Its request is not on the queue then."""
    job_id = new_job_id(queue.now())
    schedule = subjects.RequestSubject("tiny", "normal", "public", job_id).schedule
    due = {
        "Nats-Schedule": "@at 2099-01-01T00:00:00Z",
        "Nats-Schedule-Target": subjects.request("tiny", job_id),
    }
    await queue.publish_stored(schedule, REQUEST, due, 5)
    retrying = StateEvent(
        state="retrying", attempt=1, at=timestamp(), inferer="a", code="model_error"
    )
    await queue.publish_stored(subjects.state("tiny", job_id), encode(retrying), {}, 5)
    async with listing(queue) as lister:
        assert await states(lister) == {job_id: "RETRY"}


async def test_the_list_goes_on_after_a_restart_of_the_broker(
    queue: Broker, nats_server: NatsServer
) -> None:
    async with listing(queue) as lister:
        before = await accept(queue)
        assert await states(lister) == {before: "PENDING"}
        nats_server.process.kill()
        nats_server.start()
        await queue.until_connected()
        after = await accept(queue)
        await end(queue, before)
        assert await states(lister) == {before: "FAILURE", after: "PENDING"}


async def test_what_is_deleted_from_the_broker_leaves_the_list(
    queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that somebody takes off the queue, and results that are purged or expire."""
    monkeypatch.setattr(reader, "COMPARE_EVERY_S", 0.2)
    monkeypatch.setattr(reader, "READ_EVERY_S", 0.1)
    monkeypatch.setattr(reader, "SETTLED", timedelta(0))
    async with listing(queue) as lister:
        first, second, deleted, kept = [await accept(queue) for _ in range(4)]
        for job_id in (first, second):
            await end(queue, job_id)
        assert len(await states(lister)) == 4
        for job_id in (first, second, deleted):
            await queue.js.purge_stream("REQUESTS", subject=subjects.request("tiny", job_id))
        await queue.js.purge_stream("RESULTS", subject=subjects.result("tiny", first))

        async def is_gone() -> bool:
            return await states(lister) == {second: "FAILURE", kept: "PENDING"}

        await until(is_gone)


async def test_a_stream_that_was_replaced_is_read_anew(
    queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequences begin again."""
    monkeypatch.setattr(reader, "COMPARE_EVERY_S", 0.2)
    monkeypatch.setattr(reader, "READ_EVERY_S", 0.1)
    async with listing(queue) as lister:
        for _ in range(5):
            await end(queue, new_job_id(queue.now()))
        assert len(await states(lister)) == 5
        await queue.js.delete_stream("RESULTS")
        await ensure_topology(queue, Topology(), ["tiny"])
        new = new_job_id(queue.now())
        await end(queue, new)

        async def is_new() -> bool:
            return await states(lister) == {new: "FAILURE"}

        await until(is_new)


async def test_only_as_many_results_are_read_as_are_listed(queue: Broker) -> None:
    """The newest; jobs that wait are listed in any case."""
    waiting = await accept(queue)
    ended = [new_job_id(queue.now()) for _ in range(30)]
    for job_id in ended:
        await end(queue, job_id)
    async with listing(queue, max_jobs=10) as lister:
        found = await states(lister)
        assert set(found) == {waiting, *ended[-10:]}


async def test_messages_that_nobody_can_read_stop_nothing(queue: Broker) -> None:
    """Bytes, deep arrays and odd subjects in all three streams."""
    job_id = new_job_id(queue.now())
    odd = new_job_id(queue.now())
    for data in (b"\xff", b"[" * 5000, b'{"at": "soon"}', b""):
        for subject in (
            subjects.request("tiny", job_id),
            "infer.requests.tiny.normal.public.by-hand",
            subjects.state("tiny", job_id),
            "infer.states.*.x",
            subjects.result("tiny", odd),
            "infer.results.x.y",
        ):
            await queue.nc.publish(subject, data)
    async with listing(queue) as lister:
        assert await states(lister) == {job_id: "PENDING", odd: "FAILURE"}
