"""Readings of a job's events, as the broker sees them."""

import asyncio
from pathlib import Path

import pytest

from services.gateway.jobs.events import _events_until_outage, _live_events
from services.gateway.jobs.token_merger import Added, TokenReader
from shared.broker.connection import Broker, connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_token_frame, encode
from shared.wire.events import TokenFrame
from shared.wire.results import Cancelled, Result
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, NatsServer, eventually


async def test_a_consumer_whose_creation_was_not_answered_is_deleted(
    broker: Broker, nats_server: NatsServer
) -> None:
    """The broker hangs and creates it when it recovers; nobody reads from it by then."""
    await ensure_topology(broker, Topology(), [])

    async def unfinished() -> Result:
        await asyncio.Event().wait()
        raise AssertionError

    finished = asyncio.create_task(unfinished())
    async with connected(BrokerSettings(url=nats_server.url), "observer") as observer:
        created = await observer.nc.subscribe(
            f"$JS.EVENT.ADVISORY.CONSUMER.CREATED.{subjects.EVENTS}.*"
        )
        deletions = await observer.nc.subscribe(f"$JS.API.CONSUMER.DELETE.{subjects.EVENTS}.*")
        await flush(observer.nc)
        nats_server.process.freeze()
        eventually(lambda: _is_stopped(nats_server.process.pid), "it is frozen")
        with pytest.raises(BrokerUnavailable):
            await anext(_events_until_outage(broker, "tiny", new_job_id(), finished))
        nats_server.process.thaw()
        name = subjects.model_and_id((await created.next_msg(PATIENCE_S)).subject)[1]
        deletion = await deletions.next_msg(PATIENCE_S)
        assert subjects.model_and_id(deletion.subject)[1] == name
        async with asyncio.timeout(PATIENCE_S):
            while (await broker.js.stream_info(subjects.EVENTS)).state.consumer_count:
                await asyncio.sleep(0.01)
    finished.cancel()


class LiveEvents:
    """Reads a job's events as they are published, as a gateway does for its own clients."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.job_id = new_job_id()
        self.ended = asyncio.Event()
        self.finished = asyncio.create_task(self._finish())
        self.reader = TokenReader()
        self.events = _live_events(broker, "tiny", self.job_id, self.finished, self.reader)
        self.readings = 0
        """Of the stream, from its first message on."""
        self.text = ""

    async def publish(self, index: int, *tokens: str) -> None:
        frame = encode(TokenFrame(attempt=1, index=index, tokens=list(tokens)))
        subject = subjects.token_events("tiny", self.job_id)
        await self.broker.publish_stored(subject, frame, {}, PATIENCE_S)

    async def read(self, messages: int) -> None:
        for _ in range(messages):
            async with asyncio.timeout(PATIENCE_S):
                message = await anext(self.events)
            if message is None:
                self.readings += 1
                continue
            for step in self.reader.add(decode_token_frame(message.data)):
                assert isinstance(step, Added)
                self.text += step.text

    async def _finish(self) -> Result:
        await self.ended.wait()
        return Cancelled(
            id=self.job_id,
            model="tiny",
            attempt=1,
            queued_at=timestamp(),
            finished_at=timestamp(),
            code="cancelled",
            message="as it must",
        )


async def test_a_job_of_this_gateway_is_read_without_a_consumer(queue: Broker) -> None:
    job = LiveEvents(queue)
    reading = asyncio.create_task(job.read(2))
    await flush(queue.nc)
    await job.publish(0, "a")
    await job.publish(1, "b", "c")
    await reading
    assert (await queue.js.stream_info(subjects.EVENTS)).state.consumer_count == 0
    assert (job.text, job.readings) == ("abc", 0)
    job.ended.set()
    assert [message async for message in job.events] == []


async def test_what_was_missed_is_read_from_the_stream(queue: Broker) -> None:
    """The first frames are published before this subscribes."""
    job = LiveEvents(queue)
    await job.publish(0, "a")
    await job.publish(1, "b")
    reading = asyncio.create_task(job.read(1 + 1 + 3))
    await flush(queue.nc)
    await job.publish(2, "c")
    await reading
    assert (job.text, job.readings) == ("abc", 1)
    await job.publish(3, "d")
    await job.read(1)
    assert job.text == "abcd"
    job.ended.set()
    assert [message async for message in job.events] == []


async def test_after_an_outage_the_stream_is_read(queue: Broker, nats_server: NatsServer) -> None:
    """What was published during it may have been missed."""
    job = LiveEvents(queue)
    reading = asyncio.create_task(job.read(1))
    await flush(queue.nc)
    await job.publish(0, "a")
    await reading
    reading = asyncio.create_task(job.read(1 + 2))
    nats_server.process.kill()
    nats_server.start()
    await job.publish(1, "b")
    await reading
    assert (job.text, job.readings) == ("ab", 1)
    job.ended.set()
    assert [message async for message in job.events] == []


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
