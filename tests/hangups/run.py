"""``python -m tests.hangups.run``: many clients of each kind hang up early; what a gateway
still holds on to then."""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import httpx2

from shared.broker.results import decode_stored
from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.chaos.cluster import Cluster
from tests.chaos.parts import Gateway, Inferer
from tests.chaos.store import queued, read_store
from tests.hangups.clients import KINDS, LONG, Kind, Where
from tests.hangups.footprint import Footprint, footprint
from tests.support.processes import end_on_sigterm
from tests.support.tiny_model import write_tiny_model

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
    """What became of so many clients of each of some kinds."""

    kinds: str
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
        remains = "; ".join(self.problems) or "as before"
        return (
            f"{self.kinds}, jobs {'run' if self.running else 'wait'}: {self.count} times, "
            f"ended {dict(self.ends)}, {remains} after {self.took_s:.1f} s\n"
            f"    before: {self.before}\n    after:  {self.after}"
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
        self._http = httpx2.AsyncClient(base_url=gateway.url, timeout=60)
        self._seen: set[str] = set()
        """Jobs that were accepted before."""

    async def of(self, kinds: Sequence[Kind], count: int, *, running: bool) -> Outcome:
        """Have ``count`` clients of each kind hang up, those of all kinds together."""
        await self._set_slots(SLOTS if running else 0)
        where = await self._where()
        await self._hang_up(kinds, where, max(20, count // 5))  # what is made once, is made
        await self._end_jobs(lambda _: True)
        before = await self._calm()
        self._seen |= self._accepted()
        where = await self._where()
        await self._hang_up(kinds, where, count)
        staying = {kind.name for kind in kinds if not kind.cancels}
        if staying:
            await self._end_jobs(lambda kind: kind in staying)
        began = time.monotonic()
        while True:
            after = await self._footprint()
            left = set(await queued(self._cluster.broker)) - {where.job_id}
            waited_s = time.monotonic() - began
            if not (after.excess(before) or left) or waited_s > self._within_s:
                break
            await asyncio.sleep(0.1)
        names = " ".join(kind.name for kind in kinds)
        outcome = Outcome(names, running, count, before, after, waited_s)
        await self._judge(outcome, self._accepted() - self._seen - {where.job_id}, left)
        await self._end_jobs(lambda _: True)
        return outcome

    async def close(self) -> None:
        await self._http.aclose()

    async def _judge(self, outcome: Outcome, accepted: set[str], left: set[str]) -> None:
        """Of the jobs that were ``accepted``, those in ``left`` are still in the queue."""
        if more := outcome.after.excess(outcome.before):
            outcome.problems.append(f"more than before: {more}")
        grown = outcome.after.resident_bytes - outcome.before.resident_bytes
        if grown > SPARE_BYTES + BYTES_EACH * outcome.count:
            each = grown / outcome.count / 1024
            outcome.problems.append(f"{each:.0f} kB of memory for each client")
        if left:
            outcome.problems.append(f"{len(left)} jobs wait for nobody")
        results = (await read_store(self._cluster.broker)).results
        if lost := accepted - set(results) - left:
            outcome.problems.append(f"{len(lost)} accepted jobs have no result")
        wrong: Counter[tuple[str, str]] = Counter()
        for job_id in accepted & set(results):
            subject, data = results[job_id][0].subject, results[job_id][0].data
            end = getattr(decode_stored(subject, data, datetime.now(UTC)), "code", "completed")
            outcome.ends[end] += 1
            kind = _kind_of(data)
            if (end == GONE) != KINDS[kind].cancels:
                wrong[kind, end] += 1
        if wrong:
            outcome.problems.append(f"jobs that should have ended otherwise: {dict(wrong)}")

    def _accepted(self) -> set[str]:
        return {event["job_id"] for event in self._gateway.events("request_accepted")}

    async def _calm(self) -> Footprint:
        """How it is when nothing changes any more."""
        footprint = await self._footprint()
        async with asyncio.timeout(ENDED_WITHIN_S):
            while True:
                await asyncio.sleep(0.5)
                last, footprint = footprint, await self._footprint()
                if not (footprint.excess(last) or last.excess(footprint)):
                    return footprint

    async def _where(self) -> Where:
        answer = await self._http.post("/jobs", json={"prompt": "a"} | LONG)
        assert answer.status_code == 202, answer.text
        key = new_job_id()
        return Where(self._gateway.url, self._cluster.nodes[0].url, answer.json()["id"], key)

    async def _hang_up(self, kinds: Sequence[Kind], where: Where, count: int) -> None:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(kind: Kind, random: Random) -> None:
            async with places:
                await kind.hang_up(replace(where, kind=kind.name), random)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                for kind in kinds:
                    group.create_task(one(kind, Random(self._random.random())))

    async def _end_jobs(self, ends: Callable[[str], bool]) -> None:
        """Cancel all jobs of the kinds of which ``ends`` says so, until none is left."""
        broker = self._cluster.broker
        async with asyncio.timeout(ENDED_WITHIN_S):
            while True:
                left = 0
                for job_id in await queued(broker):
                    job = await broker.direct_get(
                        subjects.REQUESTS, last_by_subj=subjects.request_of(job_id)
                    )
                    if job is not None and ends(_kind_of(job.data)):
                        left += 1
                        await self._http.delete(f"/jobs/{job_id}")
                if not left:
                    return
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


def _kind_of(data: bytes) -> str:
    """The kind of client that submitted the job of which ``data`` is the request or the result."""
    return str(json.loads(data).get("metadata", {}).get("kind", ""))


async def run(
    groups: Sequence[Sequence[str]],
    count: int,
    folder: Path,
    seed: int,
    within_s: float = AS_BEFORE_WITHIN_S,
) -> list[Outcome]:
    """Each group of kinds together, and twice: while all jobs wait, and while some run."""
    outcomes = []
    async with site(folder, seed, within_s) as hang_ups:
        for names in groups:
            for running in (False, True):
                kinds = [KINDS[name] for name in names]
                outcomes.append(await hang_ups.of(kinds, count, running=running))
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
    outcomes = asyncio.run(run([[kind] for kind in asked.kinds], asked.count, folder, asked.seed))
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
