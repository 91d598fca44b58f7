"""Whatever dies: the short form of ``make chaos``, and proof that its ledger can fail."""

import os
from pathlib import Path
from random import SystemRandom

import pytest

from shared.wire.results import Failed
from tests.chaos.report import report
from tests.chaos.run import Plan, run, short_plan, write_chaos_model
from tests.chaos.sabotage import allow_second_results

pytestmark = pytest.mark.chaos

SABOTAGE = "tests.chaos.sabotage"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chaos_model(tmp_path_factory.mktemp("models"))


def _seed() -> int:
    """Another one each time; CHAOS_SEED repeats one."""
    return int(os.environ.get("CHAOS_SEED", SystemRandom().randrange(1_000_000)))


async def test_no_job_is_lost_or_doubled(tmp_path: Path, model: Path) -> None:
    """Every kind of fault strikes once, and the ledger balances."""
    plan = short_plan(_seed())
    ledger = await run(plan, tmp_path, model)
    printed = report(ledger)
    print(printed)
    assert not ledger.problems(), printed
    in_vain = {strike.kind for strike in ledger.strikes if strike.at is None}
    assert in_vain <= ({"fill_disk"} if os.geteuid() else set()), printed


async def test_a_rolling_restart_loses_and_doubles_no_job(tmp_path: Path, model: Path) -> None:
    """Of everything, under load: no job fails, and none takes a second attempt."""
    plan = Plan(
        _seed(), jobs=60, faults=[(1, "rolling_restart")], at_least_s=20, limit_s=170, is_brief=True
    )
    ledger = await run(plan, tmp_path, model)
    printed = report(ledger)
    assert not ledger.problems(), printed
    failures = [result for result in ledger.results.values() if isinstance(result, Failed)]
    assert {failed.code for failed in failures} <= {"prompt_too_long"}, printed
    assert max(result.attempt for result in ledger.results.values()) == 1, printed


async def test_second_results_are_found_by_the_ledger(tmp_path: Path, model: Path) -> None:
    """An inferer that was frozen beyond its lease stores a second result: it is found."""
    plan = Plan(
        seed=1,
        jobs=30,
        faults=[(1, "freeze_inferer")],
        nodes=1,
        inferer=(SABOTAGE, "store_second_results"),
        limit_s=150,
    )
    ledger = await run(plan, tmp_path, model, prepare=allow_second_results)
    printed = report(ledger)
    struck = ledger.strikes[0].job_id
    doubled = [problem.text for problem in ledger.problems() if problem.kind == "doubled"]
    assert any(text.startswith(f"{struck} was announced") for text in doubled), printed
    assert any("stored, only" in text for text in doubled), printed


async def test_jobs_acknowledged_before_their_result_are_found_by_the_ledger(
    tmp_path: Path, model: Path
) -> None:
    """An inferer that dies between its ack and its result loses the job: it is found."""
    plan = Plan(
        seed=1,
        jobs=20,
        faults=[(1, "kill_gateway")],
        nodes=1,
        inferer=(SABOTAGE, "acknowledge_first"),
        limit_s=150,
    )
    ledger = await run(plan, tmp_path, model)
    kinds = {problem.kind for problem in ledger.problems()}
    assert "lost" in kinds, report(ledger)
