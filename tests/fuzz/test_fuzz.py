"""A minute of ``make fuzz``, and proof that what it watches is noticed."""

import json
from math import inf
from pathlib import Path

import pytest
from hypothesis import strategies as st

from shared.job_ids import new_job_id
from tests.chaos.parts import Part
from tests.fuzz.accepted import Accepted
from tests.fuzz.attacks.attack import Attack
from tests.fuzz.findings import Findings
from tests.fuzz.hunt import hunt
from tests.fuzz.logs import Logs
from tests.fuzz.memory import Growth, Memory, Sample
from tests.fuzz.run import Plan, run
from tests.fuzz.site import Site
from tests.fuzz.target import Fault, Target
from tests.support.tiny_model import write_tiny_model

SABOTAGE = "tests.fuzz.sabotage"
SEED = 9
MIB = 1024**2


@pytest.mark.timeout(600)
def test_a_minute_of_hostile_input_finds_nothing(tmp_path: Path) -> None:
    """Requests, schemas, prompts, templates and bytes that nobody would send: nothing dies, leaks,
    hangs or gets a wrong error."""
    report = run(Plan(SEED, minutes=1), tmp_path)
    print(report)
    assert not report.findings.all, str(report)
    assert all(count > 0 for count in report.cases.values()), str(report)


@pytest.mark.timeout(300)
def test_a_process_that_dies_or_hangs_is_noticed(tmp_path: Path) -> None:
    """A gateway that holds its loop for a second and a half and then dies, an inferer that dies
    of no job, and a traceback: each is found, and the input before it is shown."""
    up = str(tmp_path / "pids.json")
    sabotaged = {"gateway": (SABOTAGE, "gateway", up), "inferer": (SABOTAGE, "inferer", up)}
    report = run(Plan(SEED, minutes=0.3, attacks=("metadata",), **sabotaged), tmp_path)
    kinds = {found.kind for found in report.findings.all}
    assert "gateway died" in kinds, str(report)
    assert "a health probe was not answered within a second" in kinds, str(report)
    assert "an inferer died of no job that is named" in kinds, str(report)
    assert any(kind.startswith("Traceback in a log of inferer") for kind in kinds), str(report)
    printed = (tmp_path / "findings.txt").read_text()
    assert f"seed {SEED}, logs in {tmp_path}" in printed
    assert "metadata: " in printed


def test_a_lost_job_and_a_broken_answer_are_noticed(tmp_path: Path) -> None:
    """An id that was given out without a job behind it, a job that ends as `worker_lost`, and the
    smallest case of many that does harm."""
    findings = Findings(SEED, tmp_path)
    accepted = Accepted()
    with Site(tmp_path, write_tiny_model(tmp_path / "tiny.gguf"), findings) as site:
        target = Target(site, accepted, findings)
        harmless = target.submit({"model": "tiny", "prompt": "a", "max_tokens": 1}, "one")
        assert harmless is not None
        assert target.end_of(harmless)["state"] == "SUCCESS"
        accepted.add(new_job_id(), "nobody has this")
        hunt(
            Attack("large", st.integers(0, 10_000), refuse_large, 100), target, findings, SEED, inf
        )
        faults = list(accepted.faults(site))
    assert [kind for kind, _ in faults] == ["an accepted job was lost"]
    assert [(found.kind, found.input) for found in findings.all] == [("too large", "large: 1000")]


def refuse_large(_: Target, size: int) -> None:
    if size >= 1_000:
        raise Fault("too large", str(size))


def test_a_leak_of_a_few_kilobytes_a_case_is_noticed() -> None:
    """Over an hour of some ten cases a second; what grows once and then no more is not."""
    assert not _growth(bytes_per_case=3_000, once=0).is_flat
    assert _growth(bytes_per_case=0, once=30 * MIB).is_flat
    assert _growth(bytes_per_case=200, once=20 * MIB).is_flat


def _growth(bytes_per_case: int, once: int) -> Growth:
    """Of a process that is checked once a second for an hour."""
    memory = Memory()
    for second in range(3_600):
        case = 10 * second
        resident = 80 * MIB + case * bytes_per_case + (once if second > 2_000 else 0)
        memory.add("gateway-0", 1, Sample(case, resident))
    (growth,) = memory.growths()
    return growth


def test_logs_are_read_once_and_errors_told_apart(tmp_path: Path) -> None:
    """A traceback as text and one as JSON, each with the name of its error; half a line waits."""
    log = tmp_path / "log"
    part = Part("gateway-0", [], {}, tmp_path, lambda _: never())
    part.logs.append(log)
    logs = Logs()
    crash = {
        "event": "request_crashed",
        "exception": [{"exc_type": "KeyError", "exc_value": "'x'"}],
    }
    log.write_text(
        f"Traceback (most recent call last):\n  File\nValueError: y\n{json.dumps(crash)}"
    )
    assert [kind for kind, _ in logs.faults([part])] == [
        "Traceback in a log of gateway: ValueError: y"
    ]
    with log.open("a") as file:
        file.write("\nall is well\n")
    (found,) = logs.faults([part])
    assert found[0] == "request_crashed in a log of gateway: KeyError"


async def never() -> bool:
    return False
