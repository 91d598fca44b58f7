"""The queue without inference, client library to client library: Sluice over NATS, where a job is
one token of a tiny model, beside Celery with Redis and taskiq with NATS, whose jobs do nothing, and
beside the least that JetStream can do (`jetstream.py`), alone and with one token of that model. The
time of one job after another, jobs per second when many are submitted at once, and the CPU time of
each part. All clients wait for results; none polls.

    .venv/bin/python -m benchmarks.peers.queues [--pairs N]
"""

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import nats
import nats.aio.client
import nats.errors

from benchmarks.measuring import describe_machine, in_turn, running_stack
from benchmarks.peers import jetstream
from benchmarks.peers.comparison import Metric, row
from benchmarks.peers.environment import (
    PYTHON,
    Client,
    celery,
    celery_worker,
    cpu_s,
    machine,
    redis,
    require,
    running,
    taskiq,
    taskiq_worker,
    versions,
)
from benchmarks.peers.publish import command_line, comparison_arguments, publish
from benchmarks.peers.sluice_client import complete
from shared.logs import configure_logs
from tests.support.processes import NatsServer, Process
from tests.support.tiny_model import write_tiny_model

PAIRS = 12
CONCURRENCY = (1, 4)
BLOCK, BURST = 40, 250
"""Jobs one after another, and at once, in each round."""
SLUICE, CELERY, TASKIQ = "Sluice", "Celery with Redis", "taskiq with NATS"
ALONE = "JetStream alone"
LEAST = "JetStream and the engine"
RECORDED = "JetStream, the engine and records"
SUBJECT = "infer.complete"
JOB = {"prompt": "one token, please", "max_tokens": 1, "seed": 1}

CLIENT, WORKER, BROKER, GATEWAY = "client", "worker or inferer", "Redis or NATS", "gateway"


class Subject(msgspec.Struct):
    """A queue: how to measure it, and the processes of its parts."""

    latency: Callable[[], list[float]]
    burst: Callable[[], float]
    parts: dict[str, Callable[[], list[int]]]

    def measure(self) -> "Figures":
        latency_ms = median(self.latency())
        before = self._cpu_s()
        took_s = self.burst()
        after = self._cpu_s()
        cpu_ms = {part: 1000 * (after[part] - before[part]) / BURST for part in self.parts}
        return Figures(latency_ms, BURST / took_s, cpu_ms)

    def _cpu_s(self) -> dict[str, float]:
        return {part: cpu_s(*pids()) for part, pids in self.parts.items()}


class Figures(msgspec.Struct):
    latency_ms: float
    jobs_per_s: float
    cpu_ms: dict[str, float]

    def cpu_ms_of(self, part: str) -> float | None:
        return self.cpu_ms.get(part)

    def cpu_ms_of_all(self) -> float:
        return sum(self.cpu_ms.values())


def main() -> int:
    options = comparison_arguments(__doc__, PAIRS).parse_args()
    require(PYTHON, "redis-server")
    configure_logs("benchmark", level=logging.ERROR)
    print(f"queues: {describe_machine()}")
    facts = machine()
    latency = Metric("Submission to result, one job after another", "ms", False)
    speed = Metric(f"Jobs per second, {BURST} at once", "jobs/s", True)
    cpu = []
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        tiny = write_tiny_model(Path(folder) / "tiny.gguf")
        for concurrency in CONCURRENCY:
            here = Path(folder) / str(concurrency)
            here.mkdir()
            with _subjects(here, tiny, concurrency) as subjects:
                measures = {name: subject.measure for name, subject in subjects.items()}
                in_turn(measures, 1)
                rounds = in_turn(measures, options.pairs)
            name = f"concurrency {concurrency}"
            latency.rows.append(row(name, rounds, lambda found: found.latency_ms, {SLUICE: 0.75}))
            speed.rows.append(row(name, rounds, lambda found: found.jobs_per_s, {SLUICE: 1.0}))
            cpu.append(_cpu(name, rounds))
    publish(
        options.to,
        "queues",
        "The queue without inference",
        CELERY,
        [latency, speed, *cpu],
        facts,
        versions(
            "nats-py", "nats-server", "celery", "redis", "redis-server", "taskiq", "taskiq-nats"
        ),
        {
            SLUICE: "INFERER_CONCURRENCY=1 and 4, INFERER_THREADS=1, two layers, one token",
            CELERY: command_line(celery_worker(1)),
            TASKIQ: command_line(taskiq_worker(1)),
            ALONE: "stored, pulled, result stored, sent, acknowledged; no gateway, no inference",
            LEAST: "JetStream alone, a gateway that only forwards, and one token of the tiny model",
            RECORDED: "that, the start stored twice before it, and the token published",
            "rounds": str(options.pairs),
        },
    )
    return 0


def _cpu(name: str, rounds: dict[str, list[Figures]]) -> Metric:
    metric = Metric(f"CPU time of a job, {BURST} at once, {name}", "ms", False)
    for part in (GATEWAY, WORKER, BROKER, CLIENT):
        metric.rows.append(row(part, rounds, partial(Figures.cpu_ms_of, part=part)))
    metric.rows.append(row("all", rounds, Figures.cpu_ms_of_all))
    return metric


@contextmanager
def _subjects(folder: Path, tiny: Path, concurrency: int) -> Iterator[dict[str, Subject]]:
    with ExitStack() as stack:
        server, redis_url = stack.enter_context(redis(folder / "redis"))
        worker = stack.enter_context(celery(folder, redis_url, concurrency))
        client = stack.enter_context(Client("celery_client", {"PEERS_REDIS": redis_url}))
        broker = stack.enter_context(NatsServer(folder / "nats"))
        taskiq_process = stack.enter_context(taskiq(folder, broker.url, concurrency))
        taskiq_client = stack.enter_context(Client("taskiq_client", {"NATS_URL": broker.url}))
        alone = stack.enter_context(NatsServer(folder / "alone"))
        jetstream_worker = stack.enter_context(
            _jetstream(alone, folder / "alone.log", "worker", str(concurrency))
        )
        work = ("worker", str(concurrency), str(tiny))
        least = stack.enter_context(_with_engine(folder / "least", *work))
        recorded = stack.enter_context(_with_engine(folder / "records", *work, jetstream.RECORDED))
        # A second thread would mostly wait: other processes use the cores too.
        environment = {"INFERER_CONCURRENCY": str(concurrency), "INFERER_THREADS": "1"}
        sluice = stack.enter_context(running_stack(tiny, "tiny", 1, **environment))
        yield {
            CELERY: _peer(client, worker, server),
            TASKIQ: _peer(taskiq_client, taskiq_process, broker.process),
            ALONE: Subject(
                latency=lambda: asyncio.run(_alone_one_after_another(alone.url)),
                burst=lambda: asyncio.run(_alone_at_once(alone.url)),
                parts={
                    WORKER: jetstream_worker.family,
                    BROKER: alone.process.family,
                    CLIENT: lambda: [os.getpid()],
                },
            ),
            LEAST: least,
            RECORDED: recorded,
            SLUICE: Subject(
                latency=lambda: asyncio.run(_one_after_another(sluice.nats.url)),
                burst=lambda: asyncio.run(_at_once(sluice.nats.url)),
                parts={
                    GATEWAY: sluice.gateways[0].family,
                    WORKER: sluice.inferers[0].family,
                    BROKER: sluice.nats.process.family,
                    CLIENT: lambda: [os.getpid()],
                },
            ),
        }


@contextmanager
def _with_engine(folder: Path, *worker: str) -> Iterator[Subject]:
    with ExitStack() as stack:
        server = stack.enter_context(NatsServer(folder))
        gateway = stack.enter_context(_jetstream(server, folder / "gateway.log", "gateway"))
        worker_process = stack.enter_context(_jetstream(server, folder / "worker.log", *worker))
        yield Subject(
            latency=lambda: asyncio.run(_one_after_another(server.url, jetstream.REQUESTS)),
            burst=lambda: asyncio.run(_at_once(server.url, jetstream.REQUESTS)),
            parts={
                GATEWAY: gateway.family,
                WORKER: worker_process.family,
                BROKER: server.process.family,
                CLIENT: lambda: [os.getpid()],
            },
        )


def _peer(client: Client, worker: Process, broker: Process) -> Subject:
    return Subject(
        latency=lambda: client.ask("latency", jobs=BLOCK),
        burst=lambda: client.ask("burst", jobs=BURST),
        parts={WORKER: worker.family, BROKER: broker.family, CLIENT: lambda: [client.pid]},
    )


def _jetstream(server: NatsServer, log: Path, *arguments: str) -> AbstractContextManager[Process]:
    command = [sys.executable, "-m", "benchmarks.peers.jetstream", *arguments]
    return running(command, log, {"NATS_URL": server.url})


async def _until_served(client: nats.aio.client.Client, subject: str) -> None:
    while True:
        try:
            await complete(client, subject, **JOB)
            return
        except nats.errors.NoRespondersError:
            await asyncio.sleep(0.1)


async def _one_after_another(url: str, subject: str = SUBJECT) -> list[float]:
    """Milliseconds of each job."""
    async with await nats.connect(url) as client:
        await _until_served(client, subject)
        took = []
        for _ in range(BLOCK):
            started = time.perf_counter()
            await complete(client, subject, **JOB)
            took.append(1000 * (time.perf_counter() - started))
        return took


async def _at_once(url: str, subject: str = SUBJECT) -> float:
    """Seconds until the last result."""
    async with await nats.connect(url) as client:
        await _until_served(client, subject)
        started = time.perf_counter()
        await asyncio.gather(*(complete(client, subject, **JOB) for _ in range(BURST)))
        return time.perf_counter() - started


async def _alone_one_after_another(url: str) -> list[float]:
    """Milliseconds of each job."""
    async with jetstream.client(url) as client:
        return await client.latency(BLOCK)


async def _alone_at_once(url: str) -> float:
    """Seconds until the last result."""
    async with jetstream.client(url) as client:
        return await client.burst(BURST)


if __name__ == "__main__":
    sys.exit(main())
