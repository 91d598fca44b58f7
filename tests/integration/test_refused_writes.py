"""A stream that takes no message of ours, as somebody has bounded it: nothing ends, and what must
not be lost is stored once the bound has been taken off."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from services.inferer.fleet.heartbeat import presence
from services.inferer.worker.pull import Puller
from services.inferer.worker.worker import Worker
from shared.broker.connection import Broker
from shared.broker.inferers import read_inferers
from shared.errors import StreamRefused
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.inferers import InfererEntry
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed, Failed
from tests.support.workers import dead_letter, ended, put, queue_is_empty, until, working

SHORT = InferenceRequest(task="complete", prompt="hi", max_tokens=20)


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    created = Engine(model, slots=1, n_ctx=2048, n_batch=256, threads=1)
    yield created
    created.close()


@asynccontextmanager
async def bounded(broker: Broker, stream: str) -> AsyncIterator[None]:
    """During the block ``stream`` takes messages of at most one byte."""
    config = (await broker.js.stream_info(stream)).config
    await broker.js.update_stream(config.evolve(max_msg_size=1))
    yield
    await broker.js.update_stream(config)


async def logged(capsys: pytest.CaptureFixture[str], event: str) -> None:
    """Wait for the log line of ``event``."""
    lines = ""

    async def check() -> bool:
        nonlocal lines
        lines += capsys.readouterr().out
        return f"] {event} " in lines  # a traceback may show where it is logged

    await until(check, f"{event} in the log")


async def test_a_publish_is_refused(queue: Broker) -> None:
    """At once, with the broker's words, and without waiting for it to pass."""
    async with bounded(queue, subjects.RESULTS):
        with pytest.raises(StreamRefused, match="message size exceeds maximum allowed"):
            await queue.publish_stored(subjects.result("tiny", "1"), b"{}", {}, patience_s=600)


async def test_a_refused_result_is_kept_until_it_is_stored(
    queue: Broker, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The inferer keeps the result until it is stored, and goes on."""
    async with working(queue, engine):
        async with bounded(queue, subjects.RESULTS):
            first = await put(queue, SHORT)
            await logged(capsys, "broker_awaited")
        second = await put(queue, SHORT)
        assert isinstance(await ended(queue, first), Completed)
        assert isinstance(await ended(queue, second), Completed)
        await queue_is_empty(queue)


@pytest.mark.parametrize("stream", [subjects.EVENTS, subjects.STATES])
async def test_refused_events_do_not_stop_a_job(queue: Broker, engine: Engine, stream: str) -> None:
    """A job's events are not worth waiting for: it ends without them."""
    async with working(queue, engine), bounded(queue, stream):
        for _ in range(2):
            assert isinstance(await ended(queue, await put(queue, SHORT)), Completed)
        await queue_is_empty(queue)


async def test_a_suspect_job_runs_only_once_its_start_is_stored(
    queue: Broker, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is worth waiting for: uncounted attempts would never end."""
    job_id = await put(queue, SHORT)
    await _deliver_once(queue)
    async with working(queue, engine):
        async with bounded(queue, subjects.STATES):
            await logged(capsys, "broker_awaited")
        assert isinstance(await ended(queue, job_id), Completed)
        await queue_is_empty(queue)


async def test_a_job_is_requeued_although_events_are_refused(queue: Broker, engine: Engine) -> None:
    """It is requeued, although the event that says so cannot be stored."""
    endless = InferenceRequest(task="complete", prompt="tell me", seed=1)
    async with (
        working(queue, engine, grace_s=0) as (worker, stopping),
        bounded(queue, subjects.EVENTS),
        bounded(queue, subjects.STATES),
    ):
        await put(queue, endless)
        await until(lambda: _runs(worker), "it runs")
        stopping.set()
        await until(lambda: _idle(worker), "it was requeued")
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 1


async def test_a_refused_dead_letter_is_kept_until_it_is_stored(
    queue: Broker, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """As results: the request is laid aside once there is a place for it."""
    async with working(queue, engine):
        async with bounded(queue, subjects.DEAD):
            job_id = await put(queue, b"no request")
            await logged(capsys, "broker_awaited")
        assert isinstance(await ended(queue, job_id), Failed)
        await dead_letter(queue, job_id)


async def test_a_refused_presence_entry_is_written_again(
    queue: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    """The entry is written as soon as it can be, at the start and later."""
    entry = _entry("first")

    async def hold() -> None:
        async with presence(queue, lambda: entry, asyncio.Event()):
            entered.set()
            await asyncio.Event().wait()

    entered = asyncio.Event()
    async with bounded(queue, f"KV_{subjects.INFERERS}"):
        holding = asyncio.create_task(hold())
        await logged(capsys, "presence_not_stored")
    await asyncio.wait_for(entered.wait(), 60)
    async with bounded(queue, f"KV_{subjects.INFERERS}"):
        await logged(capsys, "presence_not_stored")
        before = await _told_at(queue)

    async def check() -> bool:
        return await _told_at(queue) != before

    await until(check, "the entry is refreshed")
    holding.cancel()
    await asyncio.wait((holding,))
    assert (await read_inferers(queue))[0] == []


async def _deliver_once(broker: Broker) -> None:
    async with Puller(broker, "tiny") as puller:
        await (await puller.next()).nak()


async def _runs(worker: Worker) -> bool:
    return bool(worker.running)


async def _idle(worker: Worker) -> bool:
    return not worker.busy


async def _told_at(broker: Broker) -> list[str]:
    return [one.heartbeat_at for one in (await read_inferers(broker))[0]]


def _entry(inferer_id: str) -> InfererEntry:
    return InfererEntry(
        id=inferer_id,
        model="tiny",
        slots=1,
        priority=0,
        host="h",
        threads=1,
        n_ctx=2048,
        tasks=["chat", "complete"],
        started_at=timestamp(),
        version="0",
    )
