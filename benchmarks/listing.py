"""What a list of jobs costs with 50,000 of them: reading them at the start, a page, filters, and
for how long the event loop of a gateway is held meanwhile. Then what it costs that jobs wait, with
positions and ETAs. Results and requests are written to the streams as inferers and gateways write
them, and so is the entry of an inferer that takes no job.

    .venv/bin/python -m benchmarks.listing
"""

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import nats
from nats.aio.client import Client

from benchmarks.measuring import arguments, describe_machine, seconds
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings
from shared.config import BrokerSettings
from shared.job_ids import accepted_at, new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.inferers import InfererEntry
from shared.wire.listing import JobQuery
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed, Failed, Result, Timings, Usage
from tests.support.processes import PATIENCE_S, Stack, eventually

JOBS = 50_000
OVER_S = 24 * 3600
"""Over how long they were accepted."""
MODELS = ("tiny", "smollm2", "qwen2.5:1.5b", "org/name")
TEXT = "All work and no play makes Jack a dull boy. " * 20
REQUESTS = 200
WARM_UP = 20
TICK_S = 0.001
READ_S = 600.0

WAITING = (50, 50_000)
"""How many jobs wait."""
SLOTS = 2

PAGE_MS, FILTER_MS, HELD_MS = 10.0, 20.0, 50.0
"""What is allowed: of the medians, and of the longest hold."""

QUERIES = {
    "first page": {},
    "200 jobs": {"limit": "200"},
    "state=FAILURE": {"state": "FAILURE"},
    "state=SUCCESS": {"state": "SUCCESS"},
    "model": {"model": "smollm2"},
    "priority": {"priority": "high"},
    "code": {"code": "model_error"},
    "inferer": {"inferer": "inferer-3"},
    "inferer, none": {"inferer": "nobody"},
    "metadata": {"metadata.user": "u77"},
    "three at once": {"state": "FAILURE", "model": "smollm2", "metadata.user": "u77"},
    "since": {"since": ""},
    "sort=waited": {"sort": "waited"},
}


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"lists of {JOBS:,} jobs: {describe_machine()}")
    with (
        tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder,
        Stack(Path(folder)) as stack,
    ):
        stack.start_gateway()
        eventually(lambda: _status(stack.url, "/readyz") == 200, "the gateway is ready")
        last = asyncio.run(_fill(stack.nats.url))
        held_ms = asyncio.run(_measure_loop(stack.nats.url))
        stack.end_gateway()
        stack.start_gateway()
        eventually(lambda: _is_complete(stack.url), "everything is listed", READ_S)
        pages = [_page(stack.url)]
        stack.start_gateway()
        eventually(lambda: _is_complete(stack.urls[1]), "everything is listed", READ_S)
        pages.append(_page(stack.urls[1]))
        same = pages[0] == pages[1]
        print(f"  the same page after a restart and from another gateway: {same}")
        QUERIES["since"]["since"] = timestamp(accepted_at(last) - timedelta(hours=1))
        medians = {}
        with httpx2.Client(base_url=stack.url, timeout=PATIENCE_S, trust_env=False) as client:
            for name, query in QUERIES.items():
                measured = _measure(client, query)
                medians[name] = statistics.median(measured)
                p99 = sorted(measured)[int(0.99 * len(measured))]
                print(f"  {name:15}  p50 {medians[name]:6.2f} ms   p99 {p99:6.2f} ms")
        held_ms = max(held_ms, asyncio.run(_measure_waiting(stack)))
    slowest = max(value for name, value in medians.items() if name not in ("sort=waited",))
    return (
        0
        if same and medians["first page"] <= PAGE_MS and slowest <= FILTER_MS and held_ms <= HELD_MS
        else 1
    )


async def _fill(url: str) -> str:
    """Store the results. Returns the id of the last one."""
    client = await nats.connect(url)
    chance = random.Random(1)
    now = time.time()
    for number in range(JOBS):
        at = now - OVER_S + number * OVER_S / JOBS
        result = _result(at, chance)
        await client.publish(subjects.result(result.model, result.id), encode(result))
        if number % 500 == 0:
            await client.flush()
    await client.flush()
    await client.close()
    return result.id


def _result(at: float, chance: random.Random) -> Result:
    accepted = datetime.fromtimestamp(at, UTC)
    waited_s, ran_s = chance.expovariate(1 / 10), chance.expovariate(1 / 3)
    started = accepted + timedelta(seconds=waited_s)
    common: dict[str, Any] = {
        "id": new_job_id(accepted),
        "model": chance.choice(MODELS),
        "attempt": 1,
        "queued_at": timestamp(accepted),
        "started_at": timestamp(started),
        "finished_at": timestamp(started + timedelta(seconds=ran_s)),
        "inferer": f"inferer-{chance.randrange(8)}",
        "metadata": msgspec.Raw(encode({"user": f"u{chance.randrange(500)}", "batch": 7})),
        "priority": chance.choice(("high", "normal", "normal", "low")),
        "via": chance.choice(("http", "openai", "nats", "cli")),
        "preview": TEXT[:80],
        "timings": Timings(
            queued_ms=1000 * waited_s, first_token_ms=50, total_ms=1000 * ran_s, tokens_per_s=80
        ),
    }
    if chance.random() < 0.005:
        return Failed(**common, code="model_error", message="llama_decode failed")
    tokens = chance.randrange(500)
    usage = Usage(prompt_tokens=30, completion_tokens=tokens, total_tokens=30 + tokens)
    return Completed(**common, text=TEXT, finish_reason="stop", usage=usage)


async def _measure_loop(url: str) -> float:
    """A gateway in this process reads everything; then pages are asked for. Returns the longest
    time, in milliseconds, for which its event loop was held."""
    gateway = Gateway(GatewaySettings(), BrokerSettings(url=url))
    started = time.perf_counter()
    async with _watched() as reading, gateway.running(lambda: None):
        while not gateway.lister.is_complete:
            await asyncio.sleep(0.05)
        took_s = time.perf_counter() - started
        async with _watched() as listing:
            for query in (JobQuery(limit=200), JobQuery(state="FAILURE"), JobQuery(sort="ran")):
                for _ in range(REQUESTS // 10):
                    page = await gateway.job_list.page(query)
                    encode(page)
    print(f"  read in {took_s:.1f} s; loop held for {max(reading):.1f} ms at most meanwhile")
    print(f"  loop held for {max(listing):.1f} ms at most while pages were made")
    return max(reading + listing)


async def _measure_waiting(stack: Stack) -> float:
    """Pages while jobs wait. Returns the longest time, in milliseconds, for which the event loop of
    a gateway was held."""
    gateway = Gateway(GatewaySettings(), BrokerSettings(url=stack.nats.url))
    client = await nats.connect(stack.nats.url)
    async with gateway.running(lambda: None), _inferer(client):
        while not (gateway.lister.is_complete and gateway.fleet.inferers("tiny")):
            await asyncio.sleep(0.05)
        held = [0.0]
        there = 0
        for count in WAITING:
            await _queue(client, there, count)
            there = count
            last = JobQuery(state="PENDING", priority="high")
            while not (page := await gateway.job_list.page(last)).total:
                await asyncio.sleep(0.1)
            async with _watched() as late:
                for _ in range(REQUESTS // 10):
                    page = await gateway.job_list.page(JobQuery(limit=200))
                    page = await gateway.job_list.page(last)
                    encode(page)
            held += late
            print(f"  {count:,} waiting; loop held for {max(late):.1f} ms at most by pages")
            for name, query in {"first page": {}, "first in line": {"priority": "high"}}.items():
                found, measured = await asyncio.to_thread(_measure_page, stack.url, query)
                etas = sum("eta" in job for job in found["jobs"])
                positions = sum("position" in job for job in found["jobs"])
                print(
                    f"  {name:15}  p50 {statistics.median(measured):6.2f} ms   "
                    f"p99 {sorted(measured)[int(0.99 * len(measured))]:6.2f} ms   "
                    f"{positions} positions, {etas} ETAs"
                )
    await client.close()
    return max(held)


def _measure_page(url: str, query: dict[str, str]) -> tuple[dict[str, Any], list[float]]:
    query = {"state": "PENDING", **query} if query else query
    with httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        return client.get("/jobs", params=query).json(), _measure(client, query)


@asynccontextmanager
async def _inferer(client: Client) -> AsyncIterator[None]:
    """The entry of an inferer."""
    entry = InfererEntry(
        id="idle",
        model="tiny",
        slots=SLOTS,
        host="host",
        threads=1,
        n_ctx=4096,
        tasks=["chat", "complete"],
        started_at=timestamp(),
        version="1",
        prompt_tokens_per_s=1000.0,
        tokens_per_s=50.0,
        slowdowns=[1.0, 1.5],
    )

    async def beat() -> None:
        while True:
            await client.publish(subjects.inferer(entry.model, entry.id), encode(entry))
            await asyncio.sleep(1)

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()


async def _queue(client: Client, first: int, last: int) -> None:
    """Store the requests ``first`` to ``last``; the first 50 have a high priority."""
    for number in range(first, last):
        job_id = new_job_id()
        request = InferenceRequest(
            task="complete", prompt=TEXT, max_tokens=50 + number % 400, queued_at=timestamp()
        )
        priority = "high" if number < WAITING[0] else "normal"
        await client.publish(subjects.request("tiny", job_id, priority), encode(request))
        if number % 500 == 0:
            await client.flush()
    await client.flush()


@asynccontextmanager
async def _watched() -> AsyncIterator[list[float]]:
    """How late the ticks of a clock in this loop are, in milliseconds."""
    late = [0.0]

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_S)
            late.append(1000 * (time.perf_counter() - before - TICK_S))

    ticking = asyncio.create_task(tick())
    try:
        yield late
    finally:
        ticking.cancel()


def _measure(client: httpx2.Client, query: dict[str, str]) -> list[float]:
    """Milliseconds of each request."""

    def ask() -> None:
        client.get("/jobs", params=query).raise_for_status()

    for _ in range(WARM_UP):
        ask()
    return [1000 * seconds(ask) for _ in range(REQUESTS)]


def _page(url: str) -> object:
    return httpx2.get(f"{url}/jobs", timeout=PATIENCE_S, trust_env=False).json()


def _is_complete(url: str) -> bool:
    if _status(url, "/jobs") != 200:
        return False
    page = httpx2.get(f"{url}/jobs?limit=1", timeout=PATIENCE_S, trust_env=False).json()
    complete: bool = page["covers"]["complete"]
    return complete


def _status(url: str, path: str) -> int:
    try:
        return httpx2.get(url + path, timeout=PATIENCE_S, trust_env=False).status_code
    except httpx2.TransportError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
