"""One attack, as hypothesis leads it: many cases, and the smallest one that does harm."""

import time
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky

from tests.fuzz.attacks.attack import Attack
from tests.fuzz.findings import Findings
from tests.fuzz.target import Fault, Target

SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)
MOST_SMALLER_CASES = 60
"""How many smaller ones are tried once a case has done harm: each may cost a process."""


def hunt(attack: Attack, target: Target, findings: Findings, seed: int, ends_at: float) -> None:
    """Send the cases of one attack until that moment; note what does harm in its smallest form."""
    harmful: list[tuple[str, Fault]] = []
    smaller = 0

    @hypothesis.seed(seed)
    @settings(SETTINGS, max_examples=attack.count)
    @given(attack.cases)
    def send(case: Any) -> None:
        nonlocal smaller
        if not harmful and time.monotonic() > ends_at:
            return
        if harmful:
            smaller += 1
            if smaller > MOST_SMALLER_CASES:
                return
        try:
            with target.case(attack.name, case):
                attack.send(target, case)
        except Fault as fault:
            if harmful and fault.kind != harmful[-1][1].kind:
                findings.add(fault.kind, fault.text, f"{attack.name}: {case!r}")
                return
            harmful.append((f"{attack.name}: {case!r}", fault))
            raise

    try:
        send()
    except (Fault, Flaky):
        pass  # the latter says that it does not happen every time
    except ExceptionGroup as group:
        if group.split((Fault, Flaky))[1] is not None:
            raise
    if harmful:
        case, fault = harmful[-1]  # each that is tried is smaller than the one before
        findings.add(fault.kind, fault.text, case)
