"""Results against a real broker: written once, announced once, sent to who waits."""

import asyncio
from typing import Any

import pytest

from shared.broker.connection import Broker
from shared.broker.results import read_result, send_result, store_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.errors import BrokerUnavailable, StreamRefused
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_result, encode
from shared.wire.results import Cancelled, Completed, Failed, Usage
from tests.support.nats_client import flush
from tests.support.processes import NatsServer


@pytest.fixture
async def store(broker: Broker) -> Broker:
    """A connection to a broker with our streams."""
    await ensure_topology(broker, Topology(), [])
    return broker


@pytest.fixture
async def inbox(store: Broker) -> tuple[str, Any]:
    """A client's inbox, and the subscription to it."""
    subject = store.nc.new_inbox()
    return subject, await store.nc.subscribe(subject)


def completed(job_id: str, text: str, attempt: int = 1) -> Completed:
    return Completed(
        id=job_id,
        model="tiny",
        attempt=attempt,
        queued_at=timestamp(),
        finished_at=timestamp(),
        text=text,
        finish_reason="stop",
        usage=Usage(1, 2, 3),
    )


def cancelled(job_id: str) -> Cancelled:
    return Cancelled(
        id=job_id,
        model="tiny",
        attempt=0,
        queued_at=timestamp(),
        finished_at=timestamp(),
        code="cancelled",
        message="cancelled on request",
    )


async def received(broker: Broker, subscription: Any) -> list[bytes]:
    """Everything that was published before, by us too."""
    await flush(broker.nc)
    return [(await subscription.next_msg(5)).data for _ in range(subscription.pending_msgs)]


async def test_the_first_write_wins(store: Broker) -> None:
    """Of two different results both writers, and every reader, get the first."""
    job_id = new_job_id()
    assert await read_result(store, "tiny", job_id) is None
    first, second = cancelled(job_id), completed(job_id, "late", attempt=2)
    assert await store_result(store, first, 5) == first
    assert await store_result(store, second, 5) == first
    assert await read_result(store, "tiny", job_id) == first


async def test_many_writers_at_once_agree(store: Broker) -> None:
    """Whichever of ten wins, all get the same result, and that is what is stored."""
    job_id = new_job_id()
    results = [completed(job_id, f"answer {number}") for number in range(10)]
    printed = await asyncio.gather(*(store_result(store, result, 5) for result in results))
    assert printed == [await read_result(store, "tiny", job_id)] * 10
    assert printed[0] in results


async def test_a_writer_may_repeat_its_own_write(store: Broker) -> None:
    """Whoever got no confirmation writes again, and gets back its own."""
    result = completed(new_job_id(), "once")
    assert await store_result(store, result, 5) == result
    assert await store_result(store, result, 5) == result
    assert (await store.js.stream_info(subjects.RESULTS)).state.messages == 1


async def test_only_the_stored_result_is_announced(store: Broker) -> None:
    """A subscriber of `infer.finished.<id>` gets the first write, once, and no other."""
    job_id = new_job_id()
    announced = await store.nc.subscribe(subjects.finished("tiny", job_id))
    first = completed(job_id, "first")
    await store_result(store, first, 5)
    await store_result(store, completed(job_id, "second"), 5)
    await store_result(store, first, 5)
    assert await received(store, announced) == [encode(first)]


async def test_a_result_that_is_too_large_becomes_a_failure(store: Broker) -> None:
    """The job still ends, with a code that says why, and the connection stays."""
    job_id = new_job_id()
    stored = await store_result(store, completed(job_id, "x" * store.nc.max_payload, 2), 5)
    assert isinstance(stored, Failed)
    assert (stored.code, stored.attempt) == ("result_too_large", 2)
    assert await read_result(store, "tiny", job_id) == stored
    assert store.is_connected


async def test_the_largest_result_that_fits_is_stored(store: Broker) -> None:
    """To the byte: headers have room of their own."""
    job_id = new_job_id()
    empty = len(encode(completed(job_id, "")))
    fits = completed(job_id, "x" * (store.max_body - empty))
    assert len(encode(fits)) == store.max_body
    assert await store_result(store, fits, 5) == fits
    assert await read_result(store, "tiny", job_id) == fits


async def test_what_the_stream_refuses_otherwise_is_an_error(store: Broker) -> None:
    """Only "there is one already" is read as that."""
    full = (await store.js.stream_info(subjects.RESULTS)).config.evolve(max_msg_size=10)
    await store.js.update_stream(full)
    with pytest.raises(StreamRefused):
        await store_result(store, completed(new_job_id(), "x"), 5)


async def test_a_reply_is_the_result(store: Broker, inbox: tuple[str, Any]) -> None:
    """One message, which decodes to what was stored."""
    result = completed(new_job_id(), "hi")
    await send_result(store, result, inbox[0], stream=False)
    assert [decode_result(data) for data in await received(store, inbox[1])] == [result]


async def test_a_streamed_reply_ends_with_an_empty_message(
    store: Broker, inbox: tuple[str, Any]
) -> None:
    """That is how a client of a stream knows that nothing follows."""
    result = completed(new_job_id(), "hi")
    await send_result(store, result, inbox[0], stream=True)
    assert await received(store, inbox[1]) == [encode(result), b""]


@pytest.mark.parametrize(
    "subject", ["infer.results.tiny.x", "$JS.API.STREAM.DELETE.RESULTS", "", "_IN"]
)
async def test_a_reply_goes_to_inboxes_only(store: Broker, subject: str) -> None:
    """A request cannot make an inferer publish where its sender may not."""
    everything = await store.nc.subscribe(">")
    await received(store, everything)
    await send_result(store, completed(new_job_id(), "hi"), subject, stream=True)
    await send_result(store, completed(new_job_id(), "hi"), None, stream=True)
    assert await received(store, everything) == []
    assert len(await store.js.streams_info()) == 7


@pytest.mark.parametrize("inbox_name", ["_INBOX.a b", "_INBOX.a\tb"])
async def test_an_invalid_reply_subject_is_refused(store: Broker, inbox_name: str) -> None:
    """Whoever sent it harms nobody: the inferer that would answer must not fail."""
    await send_result(store, completed(new_job_id(), "hi"), inbox_name, stream=True)


async def test_a_large_reply_during_an_outage_is_unavailable(
    store: Broker, nats_server: NatsServer
) -> None:
    """It is more than the client buffers: an outage like any other, so that the caller retries."""
    nats_server.process.kill()
    async with asyncio.timeout(30):
        while store.is_connected:
            await asyncio.sleep(0.01)
    result = completed(new_job_id(), "x" * 3_000_000)
    with pytest.raises(BrokerUnavailable):
        await send_result(store, result, "_INBOX.a", stream=False)
