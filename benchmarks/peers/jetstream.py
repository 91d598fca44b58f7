"""The least that JetStream can do for a queue that loses nothing: a job is stored in a file before
it is confirmed, pulled by a worker, its result stored before it is sent, and its message
acknowledged after that. No gateway, no states, no events, no inference. Both sides have Sluice's
own connection, which takes less time than nats-py's, and the worker its event loop. The worker:

    NATS_URL=… .venv/bin/python -m benchmarks.peers.jetstream CONCURRENCY
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import uvloop
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

from shared.background import Tasks
from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings, load

JOBS, RESULTS, WORKER = "ALONE_JOBS", "ALONE_RESULTS", "worker"
REPLY_TO = "Reply-To"
PATIENCE_S = 10.0


class Worker:
    """As many pulls as jobs at once, each for one message."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._inbox = broker.nc.new_inbox()
        self._running = Tasks()

    async def run(self, concurrency: int) -> None:
        jobs = StreamConfig(
            JOBS,
            subjects=[f"{JOBS}.*"],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
        )
        results = StreamConfig(RESULTS, subjects=[f"{RESULTS}.*"], storage=StorageType.FILE)
        consumer = ConsumerConfig(durable_name=WORKER, ack_policy=AckPolicy.EXPLICIT)
        await self._broker.js.add_stream(jobs)
        await self._broker.js.add_stream(results)
        await self._broker.js.add_consumer(JOBS, consumer)
        await self._broker.nc.subscribe_directly(self._inbox, self._receive)
        for _ in range(concurrency):
            await self._pull()
        await asyncio.Event().wait()

    async def _pull(self) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS}.{WORKER}"
        await self._broker.nc.publish(subject, reply=self._inbox)

    def _receive(self, message: Msg) -> None:
        self._running.start(self._process(message), "a job")

    async def _process(self, message: Msg) -> None:
        assert message.headers is not None
        subject = f"{RESULTS}.{message.subject.rpartition('.')[2]}"
        await self._broker.publish_stored(subject, message.data, {}, PATIENCE_S)
        # These go out in one write.
        await self._broker.nc.publish(message.headers[REPLY_TO], message.data)
        await self._broker.nc.publish(message.reply, b"+ACK")
        await self._pull()


class Client:
    """Submits jobs and waits for their results."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._inbox = broker.nc.new_inbox()
        self._numbers = count(time.time_ns())
        self._waiting: dict[str, asyncio.Future[None]] = {}

    async def latency(self, jobs: int) -> list[float]:
        """Milliseconds from the submission of a job to its result, one after another."""
        took = []
        for _ in range(jobs):
            started = time.perf_counter()
            await self._run()
            took.append(1000 * (time.perf_counter() - started))
        return took

    async def burst(self, jobs: int) -> float:
        """Seconds from the first submission to the last result of ``jobs``."""
        started = time.perf_counter()
        await asyncio.gather(*(self._run() for _ in range(jobs)))
        return time.perf_counter() - started

    async def subscribe(self) -> None:
        await self._broker.nc.subscribe_directly(f"{self._inbox}.*", self._receive)

    async def _run(self) -> None:
        job_id = str(next(self._numbers))
        self._waiting[job_id] = result = asyncio.get_running_loop().create_future()
        headers = {REPLY_TO: f"{self._inbox}.{job_id}"}
        await self._broker.publish_stored(f"{JOBS}.{job_id}", b"{}", headers, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            await result

    def _receive(self, message: Msg) -> None:
        self._waiting.pop(message.subject.rpartition(".")[2]).set_result(None)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    """One that has had a result: the worker is ready."""
    async with connected(BrokerSettings(url), "client") as broker:
        client = Client(broker)
        await client.subscribe()
        await client.latency(1)
        yield client


async def _work(concurrency: int) -> None:
    async with connected(load(BrokerSettings, "NATS"), WORKER) as broker:
        await Worker(broker).run(concurrency)


if __name__ == "__main__":
    uvloop.run(_work(int(sys.argv[1])))
