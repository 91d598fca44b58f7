"""``python -m tests.fuzz.run``: whatever hypothesis thinks of is sent to a whole stack, and all
that must hold is watched meanwhile."""

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random, SystemRandom

import structlog

from tests.fuzz.accepted import Accepted
from tests.fuzz.attacks import ATTACKS
from tests.fuzz.canary import Canary
from tests.fuzz.findings import Findings
from tests.fuzz.health import Health
from tests.fuzz.hunt import hunt
from tests.fuzz.site import Site
from tests.fuzz.target import Target
from tests.fuzz.watch import Watch
from tests.support.processes import end_on_sigterm
from tests.support.tiny_model import write_tiny_model

LONGEST_TURN_S = 30.0
"""For one attack; in a short run each has its share of the time."""


@dataclass(frozen=True)
class Plan:
    """One run: the same seed makes the same cases, as many of them as there is time for."""

    seed: int
    minutes: float
    attacks: Sequence[str] = tuple(ATTACKS)
    inferer: Sequence[str] = ("services.inferer",)
    gateway: Sequence[str] = ("services.gateway",)


@dataclass
class Report:
    findings: Findings
    cases: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        printed = Counter(found.kind for found in self.findings.all)
        verdict = [f"FOUND: {kind}" for kind in printed] or ["nothing was found"]
        return "\n".join([*self.lines, *verdict])


def run(plan: Plan, folder: Path) -> Report:
    """Fuzz for as long as ``plan`` says; logs are left in ``folder``."""
    findings = Findings(plan.seed, folder)
    report = Report(findings)
    accepted = Accepted()
    model = write_tiny_model(folder / "tiny.gguf")
    with Site(folder, model, findings, plan.inferer, plan.gateway) as site:
        target = Target(site, accepted, findings)
        with (
            Health(site.pids, folder) as health,
            Watch(site, target, health, findings) as watch,
            Canary(site, accepted, findings) as canary,
        ):
            _attack(plan, target, findings, report)
        for kind, text in accepted.faults(site):
            findings.add(kind, text)
        report.lines = [
            f"{sum(report.cases.values())} cases: {dict(sorted(report.cases.items()))}",
            f"{len(accepted.ids)} jobs were accepted: {dict(accepted.ended.most_common())}",
            f"{canary.completed} canary jobs completed, the slowest in {canary.slowest_s:.1f} s",
            f"{health.answers} health probes: the slowest took {health.worst_s:.2f} s, of which "
            f"at most {health.worst_own_s:.2f} s were a gateway's own",
            f"deaths: {dict(Counter(death.name for death in site.deaths)) or 'none'}",
            *map(str, watch.memory.growths()),
        ]
    return report


def _attack(plan: Plan, target: Target, findings: Findings, report: Report) -> None:
    """One attack after another, in an order of the seed's, until the time is over."""
    ends_at = time.monotonic() + 60 * plan.minutes
    random = Random(plan.seed)
    turn_s = min(LONGEST_TURN_S, 60 * plan.minutes / len(plan.attacks))
    while time.monotonic() < ends_at:
        for name in random.sample(list(plan.attacks), len(plan.attacks)):
            before = target.cases
            turn_ends_at = time.monotonic() + turn_s
            if report.cases[name]:  # each has one case at least, however slow the machine is
                turn_ends_at = min(turn_ends_at, ends_at)
            hunt(ATTACKS[name], target, findings, random.randrange(2**32), turn_ends_at)
            report.cases[name] += target.cases - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, help="send the cases of an earlier run")
    parser.add_argument("--attacks", nargs="*", choices=list(ATTACKS), default=list(ATTACKS))
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    seed = SystemRandom().randrange(1_000_000) if asked.seed is None else asked.seed
    folder = Path(tempfile.mkdtemp(prefix="sluice-fuzz-"))
    print(f"fuzz, seed {seed}, {asked.minutes:g} minutes; logs are in {folder}", flush=True)
    report = run(Plan(seed, asked.minutes, asked.attacks), folder)
    print(report)
    if report.findings.all:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
