"""The least that JetStream can do for a queue that loses nothing: a job is stored in a file before
it is confirmed, pulled by a worker, its result stored before it is sent, and its message
acknowledged after that. No states, no events, no checks, no logs. The worker and the gateway use
Sluice's own connection, which takes less time than nats-py's, and its event loop. With a model,
each job generates one token; clients then use nats-py, as in Sluice's benchmark, and send to a
gateway that only forwards. Without one, they use Sluice's connection and submit to the queue. With
``recorded``, the start of a job is stored before it is computed, once to count attempts and once
for readers, and its token is published. The processes:

    NATS_URL=… .venv/bin/python -m benchmarks.peers.jetstream worker CONCURRENCY [MODEL [recorded]]
    NATS_URL=… .venv/bin/python -m benchmarks.peers.jetstream gateway
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import msgspec
import uvloop
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType, StreamConfig

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from shared.background import Tasks
from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings, load
from shared.wire.requests import InferenceRequest

JOBS, RESULTS, RECORDS, WORKER = "ALONE_JOBS", "ALONE_RESULTS", "ALONE_RECORDS", "worker"
RECORDED = "recorded"
REQUESTS = "alone.complete"
REPLY_TO = "Reply-To"
PATIENCE_S = 10.0
RECORD = msgspec.json.encode({"state": "started", "attempt": 1, "inferer": WORKER})


class Worker:
    """As many pulls as jobs at once, each for one message."""

    def __init__(
        self, broker: Broker, compute: Callable[[], Awaitable[bytes]], *, recorded: bool
    ) -> None:
        """``compute`` returns a job's result."""
        self._broker = broker
        self._compute = compute
        self._recorded = recorded
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
        records = StreamConfig(RECORDS, subjects=[f"{RECORDS}.>"], storage=StorageType.FILE)
        await self._broker.js.add_stream(records)
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
        job_id = message.subject.rpartition(".")[2]
        if self._recorded:
            await asyncio.gather(*(self._record(kind, job_id) for kind in ("state", "event")))
        result = await self._compute()
        if self._recorded:
            await self._broker.nc.publish(f"{RECORDS}.tokens.{job_id}", RECORD)
        subject = f"{RESULTS}.{job_id}"
        await self._broker.publish_stored(subject, result, {}, PATIENCE_S)
        # These go out in one write.
        await self._broker.nc.publish(message.headers[REPLY_TO], result)
        await self._broker.nc.publish(message.reply, b"+ACK")
        await self._pull()

    async def _record(self, kind: str, job_id: str) -> None:
        await self._broker.publish_stored(f"{RECORDS}.{kind}.{job_id}", RECORD, {}, PATIENCE_S)


class OneToken:
    """A job with inference: what Sluice's own benchmark asks for, by the same engine."""

    def __init__(self, path: Path, concurrency: int) -> None:
        self._model = Model(path, gpu_layers=0)
        self._engine = Engine(self._model, slots=concurrency, n_ctx=4096, n_batch=512, threads=1)
        self._request = InferenceRequest(task="complete", prompt="one token, please", max_tokens=1)

    async def __call__(self) -> bytes:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Generation | Exception] = loop.create_future()

        def on_end(outcome: Generation | Exception) -> None:
            loop.call_soon_threadsafe(ended.set_result, outcome)

        sequence = GenerationSequence(
            self._prepare,
            max_tokens=1,
            stop=[],
            on_text=lambda _: None,
            on_end=on_end,
        )
        sequence.is_cold = True
        self._engine.submit(sequence)
        generation = await ended
        assert isinstance(generation, Generation)
        return msgspec.json.encode({"usage": {"completion_tokens": generation.completion_tokens}})

    def _prepare(self) -> tuple[list[int], list[Sampler]]:
        prompt = self._model.tokenize(self._request.prompt or "")
        return prompt, [Sampler(self._model, self._request, 1, prompt)]


class Gateway:
    """Stores each request as a job."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._numbers = count(time.time_ns())
        self._running = Tasks()

    async def run(self) -> None:
        await self._broker.nc.subscribe_directly(REQUESTS, self._receive)
        await asyncio.Event().wait()

    def _receive(self, message: Msg) -> None:
        self._running.start(self._forward(message), "forward a job")

    async def _forward(self, message: Msg) -> None:
        subject, headers = f"{JOBS}.{next(self._numbers)}", {REPLY_TO: message.reply}
        await self._broker.publish_stored(subject, message.data, headers, PATIENCE_S)


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


async def _work(concurrency: int, model: str | None = None, recorded: str | None = None) -> None:
    async def nothing() -> bytes:
        return b"{}"

    compute = OneToken(Path(model), concurrency) if model else nothing
    async with connected(load(BrokerSettings, "NATS"), WORKER) as broker:
        await Worker(broker, compute, recorded=recorded == RECORDED).run(concurrency)


async def _forward() -> None:
    async with connected(load(BrokerSettings, "NATS"), "gateway") as broker:
        await Gateway(broker).run()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["worker", concurrency, *model]:
            uvloop.run(_work(int(concurrency), *model))
        case ["gateway"]:
            uvloop.run(_forward())
