"""What a long queue costs: 1,000, 10,000 and 100,000 jobs wait at Sluice, at Celery with Redis and
at taskiq with NATS. The time of one more submission, jobs per second when the worker runs, and the
memory of the broker and, with Sluice, the gateway. Jobs do nothing; those of Sluice are one token
of a tiny model.

Each queue is filled in the fastest way that there is. Its worker runs only when it is measured: the
others are stopped by SIGSTOP, and Sluice's inferer by ``PUT /concurrency``.

    .venv/bin/python -m benchmarks.peers.growth [--pairs N]
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from pathlib import Path
from statistics import median

import msgspec
import nats

from benchmarks.measuring import describe_machine, in_turn, running_stack
from benchmarks.peers.comparison import Metric, row
from benchmarks.peers.environment import (
    PYTHON,
    Client,
    celery,
    celery_worker,
    machine,
    memory_mib,
    redis,
    require,
    taskiq,
    taskiq_worker,
    versions,
)
from benchmarks.peers.publish import command_line, comparison_arguments, publish
from benchmarks.peers.queues import CELERY, JOB, SLUICE, TASKIQ
from benchmarks.waiting import fill
from shared.wire import subjects
from tests.support.processes import NatsServer, Process, Stack
from tests.support.tiny_model import write_tiny_model

PAIRS = 5
WAITING = (1_000, 10_000, 100_000)
SUBMISSIONS, ENDS = 40, 80
"""In each round."""
MOST_PAIRS = 9
"""More rounds would empty the shortest queue."""


class Subject(msgspec.Struct):
    """A queue whose worker is stopped."""

    fill: Callable[[int], object]
    submit: Callable[[], list[float]]
    observe: Callable[[], float]
    start: Callable[[], object]
    stop: Callable[[], object]
    holding: list[Process]
    """The processes that hold what waits."""

    def measure(self) -> tuple[float, float, float]:
        """The median of the milliseconds of a submission, jobs per second, MiB."""
        submission_ms = median(self.submit())
        self.start()
        took_s = self.observe()
        self.stop()
        pids = [pid for process in self.holding for pid in process.family()]
        return submission_ms, ENDS / took_s, memory_mib(*pids)


def main() -> int:
    options = comparison_arguments(__doc__, PAIRS).parse_args()
    pairs = min(options.pairs, MOST_PAIRS)
    require(PYTHON, "redis-server")
    print(f"growth: {describe_machine()}")
    facts = machine()
    metrics = [
        Metric("One more submission", "ms", False),
        Metric("Jobs per second while the others wait", "jobs/s", True),
        Metric("Memory of the broker and, with Sluice, the gateway", "MiB", False),
    ]
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        tiny = write_tiny_model(Path(folder) / "tiny.gguf")
        for waiting in WAITING:
            here = Path(folder) / str(waiting)
            here.mkdir()
            with _queues(here, tiny) as queues:
                for queue in queues.values():
                    queue.fill(waiting)
                measures = {name: queue.measure for name, queue in queues.items()}
                rounds = in_turn(measures, pairs)
            for place, metric in enumerate(metrics):
                figure = itemgetter(place)
                metric.rows.append(row(f"{waiting:,} waiting", rounds, figure))
    publish(
        options.to,
        "growth",
        "Many waiting jobs",
        CELERY,
        metrics,
        facts,
        versions(
            "nats-py", "nats-server", "celery", "redis", "redis-server", "taskiq", "taskiq-nats"
        ),
        {
            SLUICE: f"INFERER_CONCURRENCY=1 GATEWAY_MAX_WAITING={2 * max(WAITING)}",
            CELERY: command_line(celery_worker(1)),
            TASKIQ: command_line(taskiq_worker(1)),
            "rounds": str(pairs),
        },
    )
    return 0


@contextmanager
def _queues(folder: Path, tiny: Path) -> Iterator[dict[str, Subject]]:
    with ExitStack() as stack:
        server, redis_url = stack.enter_context(redis(folder / "redis"))
        client = stack.enter_context(Client("celery_client", {"PEERS_REDIS": redis_url}))
        worker = stack.enter_context(celery(folder, redis_url, 1))
        broker = stack.enter_context(NatsServer(folder / "nats"))
        taskiq_client = stack.enter_context(Client("taskiq_client", {"NATS_URL": broker.url}))
        taskiq_process = stack.enter_context(taskiq(folder, broker.url, 1))
        most = {"GATEWAY_MAX_WAITING": str(2 * max(WAITING))}
        sluice = stack.enter_context(running_stack(tiny, "tiny", 1, **most))
        found = {
            CELERY: _peer(client, worker, server),
            TASKIQ: _peer(taskiq_client, taskiq_process, broker.process),
            SLUICE: _sluice(sluice),
        }
        for queue in found.values():
            queue.stop()
        yield found


def _peer(client: Client, worker: Process, broker: Process) -> Subject:
    client.ask("latency", jobs=1)  # the worker is ready
    return Subject(
        fill=lambda waiting: client.ask("fill", jobs=waiting),
        submit=lambda: client.ask("submit", jobs=SUBMISSIONS),
        observe=lambda: client.ask("observe", jobs=ENDS),
        start=worker.thaw,
        stop=worker.freeze,
        holding=[broker],
    )


def _sluice(stack: Stack) -> Subject:
    def limit(slots: int) -> None:
        stack.http.put("/concurrency", json={"concurrency": slots}).raise_for_status()

    return Subject(
        fill=lambda waiting: asyncio.run(fill(stack, waiting)),
        submit=lambda: asyncio.run(_submit(stack.nats.url)),
        observe=lambda: asyncio.run(_observe(stack.nats.url)),
        start=lambda: limit(1),
        stop=lambda: limit(0),
        holding=[stack.nats.process, stack.gateways[0]],
    )


async def _submit(url: str) -> list[float]:
    """Milliseconds of each submission."""
    body = msgspec.json.encode(JOB)
    async with await nats.connect(url) as client:
        took = []
        for _ in range(SUBMISSIONS):
            started = time.perf_counter()
            reply = await client.request("infer.submit", body, 60)
            took.append(1000 * (time.perf_counter() - started))
            if b'"id"' not in reply.data:
                raise RuntimeError(f"{reply.headers} {reply.data.decode()}")
        return took


async def _observe(url: str) -> float:
    """Seconds in which so many jobs end, from the end of one."""
    async with await nats.connect(url) as client:
        subscription = await client.subscribe(subjects.FINISHED_WILDCARD)
        await subscription.next_msg(60)
        started = time.perf_counter()
        for _ in range(ENDS):
            await subscription.next_msg(60)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
