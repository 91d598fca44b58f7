"""Positions and ETAs in lists: those of `/status`, at every gateway."""

import asyncio
from datetime import timedelta

import pytest
from msgspec import UNSET

from services.gateway.eta.line import MOST_IN_LINE, Line
from services.gateway.gateway import Gateway
from services.gateway.jobs.caller import Caller
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker import streams
from shared.broker.connection import Broker
from shared.broker.consumers import read_model
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry
from shared.wire.listing import JobQuery, ListedJob
from shared.wire.requests import Work
from tests.integration.test_gateway_cost import running_gateway
from tests.support.processes import PATIENCE_S, NatsServer

CALLER = Caller("http")
HIGH, NORMAL, LOW = 6, 40, 14
PRIORITIES = ["low"] * LOW + ["normal", "high"] * HIGH + ["normal"] * (NORMAL - HIGH)


async def add_inferer(
    queue: Broker, slots: int, name: str = "i", jobs_per_batch: int | None = None
) -> None:
    """An entry as an inferer stores it."""
    entry = InfererEntry(
        id=name,
        model="tiny",
        slots=slots,
        host="h",
        threads=1,
        n_ctx=4096,
        tasks=["chat", "complete"],
        started_at=timestamp(queue.now()),
        version="1",
        prompt_tokens_per_s=1000.0,
        tokens_per_s=50.0,
        slowdowns=[1.0, 1.5],
        jobs_per_batch=jobs_per_batch,
    )
    await queue.publish_stored(subjects.inferer("tiny", name), encode(entry), {}, PATIENCE_S)


@pytest.fixture(autouse=True)
async def entries_stay(queue: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is."""
    monkeypatch.setattr(streams, "PRESENCE_TTL", timedelta(hours=1))
    await ensure_topology(queue, Topology(), ["tiny"])


async def until_complete(gateway: Gateway, inferers: int = 1) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not gateway.lister.is_complete or len(gateway.fleet.inferers("tiny")) < inferers:
            await asyncio.sleep(0.01)


async def accept(gateway: Gateway, priority: str = "normal", size: int = 0) -> str:
    submission = JobSubmission(
        model="tiny",
        prompt="x" * (1 + 10 * size),
        max_tokens=10 + 20 * size,
        priority=priority,  # type: ignore[arg-type]
    )
    return (await gateway.jobs.submit(submission, CALLER)).id


async def listed(gateway: Gateway) -> dict[str, ListedJob]:
    page = await gateway.job_list.page(JobQuery(limit=200))
    assert page.covers.complete
    return {job.id: job for job in page.jobs}


def position_of(job: ListedJob) -> int:
    assert job.position is not UNSET
    return job.position


@pytest.mark.parametrize("slots", [1, 2])
async def test_a_list_shows_what_the_status_shows(
    queue: Broker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Of jobs of all priorities and several sizes. Those behind the first 50 have only a
    position."""
    await add_inferer(queue, slots)
    async with running_gateway(nats_server.url) as gateway:
        await until_complete(gateway)
        ids = [await accept(gateway, one, at % 7) for at, one in enumerate(PRIORITIES)]
        now = gateway.broker.now()
        monkeypatch.setattr(gateway.broker, "now", lambda: now)
        jobs = await listed(gateway)
        positions = {job_id: position_of(job) for job_id, job in jobs.items()}
        assert sorted(positions.values()) == list(range(len(ids)))
        for job_id in ids:
            job, status = jobs[job_id], await gateway.jobs.status(job_id)
            assert (job.position, job.state) == (status.position, status.state)
            assert status.eta is not UNSET
            assert job.eta == (status.eta if positions[job_id] < MOST_IN_LINE else UNSET)


async def test_the_oldest_ends_sooner_where_jobs_take_turns(
    queue: Broker, nats_server: NatsServer
) -> None:
    """If a batch has two of three jobs, the oldest is in each, and the others in every second."""
    await add_inferer(queue, 3)
    async with running_gateway(nats_server.url) as gateway:
        await until_complete(gateway)
        ids = [await accept(gateway) for _ in range(3)]

        async def estimates() -> list[float]:
            statuses = [await gateway.jobs.status(job_id) for job_id in ids]
            return [status.eta.p50_s for status in statuses if status.eta]

        before = await estimates()
        await add_inferer(queue, 3, jobs_per_batch=2)
        async with asyncio.timeout(PATIENCE_S):
            while (after := await estimates())[0] > 0.9 * before[0]:
                await asyncio.sleep(0.01)
        assert after[2] > 0.9 * before[2]


async def test_another_gateway_shows_the_same(queue: Broker, nats_server: NatsServer) -> None:
    """One that starts later, and has announced and counted nothing."""
    await add_inferer(queue, 1)
    async with running_gateway(nats_server.url) as first:
        await until_complete(first)
        for priority in PRIORITIES:
            await accept(first, priority)
        expected = {one: job.position for one, job in (await listed(first)).items()}
        async with running_gateway(nats_server.url) as second:
            await until_complete(second)
            jobs = await listed(second)
            assert {one: job.position for one, job in jobs.items()} == expected
            assert sum(job.eta is not UNSET for job in jobs.values()) == MOST_IN_LINE


async def test_without_an_inferer_jobs_have_a_position_only(
    queue: Broker, nats_server: NatsServer
) -> None:
    async with running_gateway(nats_server.url) as gateway:
        await until_complete(gateway, inferers=0)
        job_id = await accept(gateway)
        job = (await listed(gateway))[job_id]
        assert (job.position, job.eta) == (0, UNSET)


async def test_an_inferer_without_slots_gets_none_of_the_jobs_that_wait(
    queue: Broker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They all share the other inferer with the job that runs there."""
    await add_inferer(queue, 2)
    async with running_gateway(nats_server.url) as gateway:
        await until_complete(gateway)
        running = await accept(gateway)
        now = gateway.broker.now()
        monkeypatch.setattr(gateway.broker, "now", lambda: now)
        work = Work(prompt_bytes=400, max_tokens=256, task="complete")
        started = StateEvent(state="started", attempt=1, at=timestamp(now), inferer="i", work=work)
        await queue.publish_stored(subjects.state("tiny", running), encode(started), {}, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while not gateway.forecast.knows_of(running):
                await asyncio.sleep(0.01)
        eta = (await gateway.jobs.status(running)).eta
        assert eta is not UNSET
        await add_inferer(queue, 0, "j")
        await until_complete(gateway, inferers=2)
        assert (await gateway.jobs.status(running)).eta == eta


async def test_a_retry_has_a_position_once_it_is_back_on_the_queue(
    queue: Broker, nats_server: NatsServer
) -> None:
    """At its end; while it is scheduled, it has none, as in `/status`."""
    async with running_gateway(nats_server.url) as gateway:
        await until_complete(gateway, inferers=0)
        first, other = [await accept(gateway) for _ in range(2)]
        retrying = StateEvent(
            state="retrying", attempt=1, at=timestamp(), inferer="i", code="model_error"
        )
        await queue.publish_stored(subjects.state("tiny", first), encode(retrying), {}, PATIENCE_S)
        subject = subjects.RequestSubject("tiny", "normal", "public", first)
        stored = await queue.direct_get(subjects.REQUESTS, last_by_subj=subject.request)
        assert stored is not None
        at = timestamp(queue.now() + timedelta(seconds=2))
        due = {"Nats-Schedule": f"@at {at}", "Nats-Schedule-Target": subject.request}
        await queue.publish_stored(subject.schedule, stored.data, due, PATIENCE_S)
        await queue.delete(subjects.REQUESTS, stored.sequence)
        job = (await listed(gateway))[first]
        assert (job.state, job.position) == ("RETRY", UNSET)
        assert (await gateway.jobs.status(first)).position is UNSET
        async with asyncio.timeout(PATIENCE_S):
            while (await gateway.jobs.status(first)).position is UNSET:
                await asyncio.sleep(0.05)
        jobs = await listed(gateway)
        assert [jobs[one].position for one in (other, first)] == [0, 1]
        status = await gateway.jobs.status(first)
        assert (status.state, status.position) == ("RETRY", 1)


async def test_a_message_that_is_not_a_request_is_left_out(queue: Broker) -> None:
    """As long as a gateway has not read the queue."""
    for job_id in ("x", "x" * (subjects.LONGEST_ID + 1), "y"):
        subject = f"infer.requests.tiny.normal.public.{job_id}"
        await queue.publish_stored(subject, b"{}", {}, PATIENCE_S)
    model = await read_model(queue, "tiny")
    assert model is not None
    first = await Line(queue, WaitingJobs(queue)).first(model)
    assert [one.job_id for one in first] == ["x", "y"]
