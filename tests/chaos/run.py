"""``python -m tests.chaos.run``: many jobs, random faults, and a ledger that has to balance."""

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom

import structlog

from tests.chaos.errands import errands
from tests.chaos.faults import FAULTS
from tests.chaos.ledger import Ledger
from tests.chaos.report import report
from tests.chaos.site import Site
from tests.chaos.store import queued, read_store
from tests.chaos.strike import Strike
from tests.support.processes import end_on_sigterm
from tests.support.tiny_model import write_tiny_model

EMPTY_WITHIN_S = 150.0
"""After the last client has gone, for jobs that nobody waits for."""

POISON, POISON_EVERY_S = "poison", 60.0


@dataclass(frozen=True)
class Plan:
    """One run; the same seed gives the same jobs and the same faults, if not the same moments."""

    seed: int
    jobs: int
    faults: list[tuple[float, str]]
    """Each with the pause before it strikes."""
    nodes: int = 3
    inferer: tuple[str, ...] = ("services.inferer",)
    limit_s: float = 1_800.0
    is_brief: bool = False
    at_least_s: float = 0.0
    """Over how long the jobs come, if that is longer than until the last fault strikes."""

    @property
    def duration_s(self) -> float:
        return max(self.at_least_s, sum(pause_s for pause_s, _ in self.faults))


def long_plan(seed: int, jobs: int = 600, rounds: int = 5) -> Plan:
    """Every fault once in each round, in any order; and a poisoned job every minute."""
    random = Random(f"{seed}/faults")
    others = [kind for kind in FAULTS if kind != POISON]
    kinds = [kind for _ in range(rounds) for kind in random.sample(others, len(others))]
    faults, since_poison_s = [], POISON_EVERY_S
    for kind in kinds:
        if since_poison_s >= POISON_EVERY_S:
            faults.append((0.0, POISON))
            since_poison_s = 0.0
        faults.append((random.uniform(3, 8), kind))
        since_poison_s += faults[-1][0]
    return Plan(seed, jobs, faults)


def short_plan(seed: int, jobs: int = 40) -> Plan:
    """Every fault once; first those whose job has to wait for the end of a lease."""
    random = Random(f"{seed}/faults")
    slow = [POISON, "freeze_inferer", "hang_compute", "kill_inferer"]
    others = random.sample([kind for kind in FAULTS if kind not in slow], len(FAULTS) - len(slow))
    faults = [(random.uniform(1, 2), kind) for kind in [*slow, *others]]
    return Plan(seed, jobs, faults, limit_s=170, is_brief=True)


def write_chaos_model(folder: Path) -> Path:
    return write_tiny_model(folder / "tiny.gguf")


async def run(
    plan: Plan,
    folder: Path,
    model: Path,
    prepare: Callable[[Site], Awaitable[None]] | None = None,
) -> Ledger:
    """Carry ``plan`` out; ``prepare`` is called when everything serves, before the first job."""
    ledger = Ledger(plan.seed)
    async with (
        asyncio.timeout(plan.limit_s),
        Site(folder, model, plan.nodes, plan.inferer, ledger) as site,
    ):
        if prepare is not None:
            await prepare(site)
        async with asyncio.TaskGroup() as group:
            group.create_task(_strike(plan, site, ledger))
            group.create_task(site.clients.run(errands(plan.seed, plan.jobs, plan.duration_s)))
        await _until_empty(site)
        ledger.store = await read_store(site.cluster.broker)
        ledger.announced = dict(site.listener.announced)
        ledger.oddities += [*site.deaths, *site.tracebacks()]
        ledger.finishes = Counter(
            event["job_id"] for inferer in site.inferers for event in inferer.events("job_finished")
        )
    return ledger


async def _strike(plan: Plan, site: Site, ledger: Ledger) -> None:
    """One fault after another; the next may strike while the last one is still felt."""
    began = time.time()
    async with asyncio.TaskGroup() as group:
        for number, (pause_s, kind) in enumerate(plan.faults):
            await asyncio.sleep(pause_s)
            random = Random(f"{plan.seed}/faults/{number}")
            strike = Strike(kind, random, began, plan.is_brief)
            ledger.strikes.append(strike)
            group.create_task(_carry_out(site, strike, ledger))


async def _carry_out(site: Site, strike: Strike, ledger: Ledger) -> None:
    try:
        await FAULTS[strike.kind](site, strike)
    except Exception as error:
        ledger.oddities.append(f"{strike.kind} of {strike.target}: {error!r}")
    strike.ended = time.time()
    print(strike, flush=True)


async def _until_empty(site: Site) -> None:
    deadline = time.monotonic() + EMPTY_WITHIN_S
    while await queued(site.cluster.broker) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeat the jobs and faults of an earlier run")
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5, help="how often each fault strikes")
    parser.add_argument("--short", action="store_true", help="the form that is part of make test")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    seed = SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    plan = short_plan(seed) if asked.short else long_plan(seed, asked.jobs, asked.rounds)
    folder = Path(tempfile.mkdtemp(prefix="sluice-chaos-"))
    print(
        f"chaos, seed {seed}: {plan.jobs} jobs, {len(plan.faults)} faults in "
        f"{plan.duration_s:.0f} s; logs are in {folder}",
        flush=True,
    )
    ledger = asyncio.run(run(plan, folder, write_chaos_model(folder)))
    print(report(ledger))
    if ledger.problems():
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
