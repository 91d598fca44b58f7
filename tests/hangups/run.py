"""``python -m tests.hangups.run``: many clients of each kind hang up early; what a gateway
still holds on to then."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import httpx

from shared.job_ids import new_job_id
from shared.results import decode_stored
from tests.chaos.cluster import Cluster
from tests.chaos.parts import Gateway, Inferer
from tests.chaos.store import queued, read_store
from tests.hangups.clients import KINDS, LONG, Kind, Where
from tests.hangups.footprint import Footprint, footprint
from tests.tiny_model import write_tiny_model

AT_ONCE = 50
AS_BEFORE_WITHIN_S = 5.0
ENDED_WITHIN_S = 120.0
SPARE_BYTES = 12 * 1024**2
"""What the heap of a gateway may gain in any case."""
BYTES_EACH = 8 * 1024
"""What it may gain for each client that hung up, as the most: a leak of one stream is 200 kB."""
SLOTS = 2
GONE = "client_disconnected"


@dataclass
class Outcome:
    """What became of so many clients of one kind."""

    kind: str
    running: bool
    """Whether their jobs could start before they hung up."""
    count: int
    before: Footprint
    after: Footprint
    took_s: float
    """Until everything was as before; or until that was given up."""
    ends: Counter[str] = field(default_factory=Counter)
    """How their jobs ended."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        grown = (self.after.resident_bytes - self.before.resident_bytes) / 1024**2
        told = "; ".join(self.problems) or "as before"
        return (
            f"{self.kind:<20} {'running' if self.running else 'waiting':<8} {self.count:>5} times, "
            f"jobs {dict(self.ends)}, {grown:+.1f} MiB, {told} after {self.took_s:.1f} s"
        )


class HangUps:
    """A broker, one gateway and one inferer, of which clients of every kind ask for something."""

    def __init__(
        self, cluster: Cluster, gateway: Gateway, counted: Path, seed: int, within_s: float
    ) -> None:
        """``counted`` is where the gateway writes how many tasks it has; everything is to be as
        before ``within_s``."""
        self._within_s = within_s
        self._cluster = cluster
        self._gateway = gateway
        self._counted = counted
        self._random = Random(seed)
        self._http = httpx.AsyncClient(base_url=gateway.url, timeout=60)
        self._seen: set[str] = set()
        """Jobs that have ended before."""

    async def of(self, kind: Kind, count: int, *, running: bool) -> Outcome:
        """Have ``count`` clients of one kind hang up."""
        await self._set_slots(SLOTS if running else 0)
        where = await self._where()
        await self._hang_up(kind, where, max(20, count // 5))  # what is made once, is made
        await self._settle(kind)
        # First, as reading leaves consumers of its own behind for some seconds.
        self._seen |= set((await read_store(self._cluster.broker)).results)
        before = await self._footprint()
        where = await self._where()
        await self._hang_up(kind, where, count)
        began = time.monotonic()
        if not kind.cancels:
            await self._settle(kind)
            began = time.monotonic()
        while True:
            after = await self._footprint()
            left = await queued(self._cluster.broker) if kind.cancels else []
            waited_s = time.monotonic() - began
            as_before = not after.excess(before) and not set(left) - {where.job_id}
            if as_before or waited_s > self._within_s:
                break
            await asyncio.sleep(0.1)
        outcome = Outcome(kind.name, running, count, before, after, waited_s)
        await self._judge(kind, outcome, where, set(left))
        await self._settle(kind)
        return outcome

    async def close(self) -> None:
        await self._http.aclose()

    async def _judge(self, kind: Kind, outcome: Outcome, where: Where, left: set[str]) -> None:
        """``left`` are the jobs that are still in the queue."""
        if more := outcome.after.excess(outcome.before):
            outcome.problems.append(f"more than before: {more}")
        grown = outcome.after.resident_bytes - outcome.before.resident_bytes
        if grown > SPARE_BYTES + BYTES_EACH * outcome.count:
            each = grown / outcome.count / 1024
            outcome.problems.append(f"{each:.0f} kB of memory for each client")
        if waiting := left - {where.job_id}:
            outcome.problems.append(f"{len(waiting)} jobs wait for nobody")
        for job_id, stored in (await read_store(self._cluster.broker)).results.items():
            if job_id in self._seen or job_id == where.job_id:
                continue
            result = decode_stored(job_id, stored[0].data, datetime.now(UTC))
            outcome.ends[getattr(result, "code", "completed")] += 1
        wrong = {end: count for end, count in outcome.ends.items() if (end == GONE) != kind.cancels}
        if wrong:
            outcome.problems.append(f"jobs that should have ended otherwise: {wrong}")

    async def _where(self) -> Where:
        answer = await self._http.post("/jobs", json={"prompt": "a"} | LONG)
        assert answer.status_code == 202, answer.text
        key = new_job_id()
        return Where(self._gateway.url, self._cluster.nodes[0].url, answer.json()["id"], key)

    async def _hang_up(self, kind: Kind, where: Where, count: int) -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(random: Random) -> None:
            async with places:
                await kind.hang_up(where, random)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(Random(self._random.random())))

    async def _settle(self, kind: Kind) -> None:
        """Until no job is left: those that are to be cancelled have a moment to be."""
        if kind.cancels:
            await asyncio.sleep(AS_BEFORE_WITHIN_S / 2)
        async with asyncio.timeout(ENDED_WITHIN_S):
            while left := await queued(self._cluster.broker):
                for job_id in left:
                    await self._http.delete(f"/jobs/{job_id}")
                await asyncio.sleep(0.2)

    async def _set_slots(self, slots: int) -> None:
        answer = await self._http.put("/concurrency", json={"concurrency": slots})
        assert answer.status_code == 200, answer.text

    async def _footprint(self) -> Footprint:
        node = self._cluster.nodes[0]
        return await footprint(node, self._gateway, self._cluster.broker, self._counted)


@asynccontextmanager
async def site(folder: Path, seed: int, within_s: float) -> AsyncIterator[HangUps]:
    """Everything that runs, during the block."""
    model = write_tiny_model(folder / "tiny.gguf")
    async with Cluster(folder, nodes=1) as cluster:
        counted = folder / "tasks"
        module = ("tests.hangups.counted_gateway", str(counted))
        gateway = Gateway("gateway", folder, cluster.url, 1, module=module)
        settings = {"INFERER_CONCURRENCY": str(SLOTS), "INFERER_N_CTX": "8192"}
        inferer = Inferer("inferer", folder, cluster.url, model, **settings)
        hang_ups = HangUps(cluster, gateway, counted, seed, within_s)
        try:
            for part in (gateway, inferer):
                part.launch()
                await part.until_ready()
            while not await gateway.known_inferers():
                await asyncio.sleep(0.1)
            yield hang_ups
        finally:
            await hang_ups.close()
            inferer.kill()
            gateway.kill()


async def run(
    kinds: Sequence[str],
    count: int,
    folder: Path,
    seed: int,
    within_s: float = AS_BEFORE_WITHIN_S,
) -> list[Outcome]:
    """Each kind twice: while all jobs wait, and while some run."""
    outcomes = []
    async with site(folder, seed, within_s) as hang_ups:
        for name in kinds:
            for running in (False, True):
                outcomes.append(await hang_ups.of(KINDS[name], count, running=running))
                print(outcomes[-1], flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hangups.run", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sluice-hangups-"))
    print(f"{asked.count} of each kind, seed {asked.seed}; logs are in {folder}", flush=True)
    outcomes = asyncio.run(run(asked.kinds, asked.count, folder, asked.seed))
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
