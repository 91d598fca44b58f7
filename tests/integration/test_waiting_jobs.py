"""How a gateway follows the queue, on a real broker."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.gateway.eta.forecast import Forecast
from services.gateway.state import waiting_jobs
from services.gateway.state.fleet import Fleet
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S

QUEUE = ("tiny", "normal")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is read as soon as it is known to differ."""
    monkeypatch.setattr(waiting_jobs, "READ_AGAIN_S", -1.0)


@pytest.fixture
async def following(queue: Broker) -> AsyncIterator[WaitingJobs]:
    known = WaitingJobs(queue)
    await known.follow()
    yield known
    await known.close()


async def put(queue: Broker, job_id: str | None = None, model: str = "tiny") -> int:
    """Put a job on the queue; its sequence."""
    subject = subjects.request(model, job_id or new_job_id())
    stored = await queue.publish_stored(subject, b"{}", {}, PATIENCE_S)
    await flush(queue.nc)
    return stored.seq


async def until_known(known: WaitingJobs, before: int, waiting: int) -> int:
    async with asyncio.timeout(PATIENCE_S):
        while (counted := known.count(QUEUE, 0, before, waiting)) is None:
            await asyncio.sleep(0.01)
    return counted


def reads(queue: Broker, monkeypatch: pytest.MonkeyPatch) -> list[list[StoredMessage]]:
    """The pages that ``queue`` reads from now on."""
    pages: list[list[StoredMessage]] = []
    read = queue.direct_get_all

    async def noted(*args: object, **query: object) -> list[StoredMessage]:
        pages.append(await read(*args, **query))  # type: ignore[arg-type]
        return pages[-1]

    monkeypatch.setattr(queue, "direct_get_all", noted)
    return pages


async def test_the_queue_is_read_once_and_then_followed(
    queue: Broker, following: WaitingJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = reads(queue, monkeypatch)
    first = [await put(queue) for _ in range(3)]
    assert await until_known(following, first[2], waiting=3) == 2
    job_id = new_job_id()
    await put(queue, job_id)
    last = await put(queue)
    assert following.count(QUEUE, 0, last, waiting=5) == 4
    following.on_end("tiny", job_id)
    assert following.count(QUEUE, 0, last, waiting=4) == 3
    assert len(pages) == 1


async def test_a_difference_of_a_moment_does_not_read_the_queue(
    queue: Broker, following: WaitingJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker's count and the announcements are not of one moment."""
    sequence = await put(queue)
    await until_known(following, sequence, waiting=1)
    pages = reads(queue, monkeypatch)
    monkeypatch.setattr(waiting_jobs, "DIFFERS_S", 0.2)
    for _ in range(4):
        assert following.count(QUEUE, 0, sequence, waiting=2) is None
        await asyncio.sleep(0.1)
        assert following.count(QUEUE, 0, sequence, waiting=1) == 0
    assert pages == []


async def test_a_lasting_difference_does(
    queue: Broker, following: WaitingJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known stays until all has been read; what is announced meanwhile is not lost."""
    sequences = [await put(queue) for _ in range(2)]
    await until_known(following, sequences[1], waiting=2)
    monkeypatch.setattr(waiting_jobs, "DIFFERS_S", 0.0)
    monkeypatch.setattr(waiting_jobs, "PAGE", 1)
    read, reading, go_on = queue.direct_get_all, asyncio.Event(), asyncio.Event()

    async def slow(*args: object, **query: object) -> list[StoredMessage]:
        page = await read(*args, **query)  # type: ignore[arg-type]
        reading.set()
        await go_on.wait()
        return page

    monkeypatch.setattr(queue, "direct_get_all", slow)
    for _ in range(2):
        assert following.count(QUEUE, 0, sequences[1], waiting=7) is None
    await reading.wait()
    sequences.append(await put(queue))
    assert following.count(QUEUE, 0, sequences[2], waiting=3) == 2
    index = following._index
    go_on.set()
    async with asyncio.timeout(PATIENCE_S):
        while following._index is index:
            await asyncio.sleep(0.01)
    assert following.count(QUEUE, 0, sequences[2], waiting=3) == 2


async def test_after_a_reconnect_nothing_is_known_until_the_queue_is_read(
    queue: Broker, following: WaitingJobs
) -> None:
    """One job may have been accepted and another cancelled meanwhile: the numbers would agree."""
    sequences = [await put(queue) for _ in range(2)]
    await until_known(following, sequences[1], waiting=2)
    await queue._announce_reconnected()
    assert following.count(QUEUE, 0, sequences[1], waiting=2) is None
    assert await until_known(following, sequences[1], waiting=2) == 1


async def test_a_reading_that_a_reconnect_interrupts_is_not_believed(
    queue: Broker, following: WaitingJobs
) -> None:
    sequence = await put(queue)
    assert following.count(QUEUE, 0, sequence, waiting=1) is None
    await queue._announce_reconnected()
    await asyncio.sleep(0.2)
    assert following._index is None
    assert await until_known(following, sequence, waiting=1) == 0


async def test_a_request_with_an_id_that_is_too_long_is_left_out(queue: Broker) -> None:
    """It may stay on the queue for ever, where nobody serves its model."""
    await put(queue, "x" * 300, model="nobody")
    sequence = await put(queue)
    assert await until_known(WaitingJobs(queue), sequence, waiting=1) == 0


async def test_what_the_queues_do_not_hold_is_forgotten(
    queue: Broker, following: WaitingJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announcements by hand: of a model that nobody serves, and more than are waiting."""
    monkeypatch.setattr(waiting_jobs, "MOST_EARLY", 5)
    sequence = await put(queue)
    await until_known(following, sequence, waiting=1)
    for model, numbers in (("nobody", range(1)), ("tiny", range(1, 11))):
        for number in numbers:
            headers = {
                "Nats-Subject": subjects.request(model, f"forged-{number}"),
                "Nats-Sequence": str(sequence + 1000 + number),
            }
            subject = subjects.accepted(model, f"forged-{number}")
            await queue.nc.publish(subject, b"", headers=headers)
    await flush(queue.nc)
    assert following._index is not None
    async with asyncio.timeout(PATIENCE_S):
        while len(following._index) < 12:
            await asyncio.sleep(0.01)
    fleet = Fleet(queue, Topology(), [])
    Forecast(queue, fleet, following)
    await fleet.refresh()
    assert len(following._index) == 0
    monkeypatch.setattr(waiting_jobs, "DIFFERS_S", 0.0)
    assert await until_known(following, sequence, waiting=1) == 0
