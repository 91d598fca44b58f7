"""The fleet as gateways, NATS clients and the command see it."""

import asyncio
import json
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

from shared import subjects
from shared.broker import connected
from shared.config import BrokerSettings
from shared.cpus import own_cpus
from tests.processes import PATIENCE_S, Stack, clean_environment, eventually, scripts


def test_an_inferer_says_what_it_is_and_does(stack: Stack, nats_command: str) -> None:
    """Model, slots, CPUs and, after its first job, speed; the same over HTTP, NATS, the CLI."""
    (idle,) = _inferers(stack)
    assert (idle["id"], idle["model"], idle["slots"]) == ("inferer-0", "tiny", 1)
    assert (idle["state"], idle["jobs"], idle["threads"]) == ("idle", [], 1)
    assert idle["cpus"] == own_cpus()
    assert (idle["tokens_per_s"], idle["prompt_tokens_per_s"]) == (None, None)

    job_id = stack.submit(prompt="go on", max_tokens=2000)
    (busy,) = eventually(lambda: _busy(stack), "the inferer tells of its job")
    (job,) = busy["jobs"]
    assert (job["id"], job["attempt"], job["max_tokens"]) == (job_id, 1, 2000)
    assert 0 <= job["completion_tokens"] <= 2000
    stack.http.delete(f"/jobs/{job_id}")

    assert stack.wait_for_end(stack.submit(prompt="go on", max_tokens=20))["state"] == "SUCCESS"
    (measured,) = eventually(lambda: _measured(stack), "the inferer tells of its speed")
    assert measured["tokens_per_s"] > 0
    assert measured["prompt_tokens_per_s"] > 0
    lists = (
        _run([nats_command, "--server", stack.nats.url, "req", "infer.inferers", "", "--raw"]),
        _run([str(scripts() / "sluice"), "inferers", "--url", stack.url, "--json"]),
    )
    for printed in lists:
        assert [entry["id"] for entry in json.loads(printed)["inferers"]] == ["inferer-0"]
    table = _run([str(scripts() / "sluice"), "inferers", "--url", stack.url])
    assert "inferer-0" in table
    assert "idle" in table


def test_inferers_come_and_go(stack: Stack, tiny_model: Path) -> None:
    """One that stops is gone at once, one that is killed within ten seconds and some."""
    second = stack.start_inferer(tiny_model)
    third = stack.start_inferer(tiny_model)
    eventually(lambda: _ids(stack) == ["inferer-0", "inferer-1", "inferer-2"], "three are live")
    second.terminate()
    assert _ids(stack) == ["inferer-0", "inferer-2"]
    third.kill()
    eventually(lambda: _ids(stack) == ["inferer-0"], "the dead one is gone")


def test_the_limit_follows_a_crash(stack: Stack, tiny_model: Path) -> None:
    """A killed inferer's place is kept until its job has come back to another; then it is gone."""
    stack.wait_until_served("tiny")
    assert _limit(stack) == 1
    second = stack.start_inferer(tiny_model)
    eventually(lambda: _limit(stack) == 2, "one for each")
    ids = [stack.submit(prompt="go on", max_tokens=2000) for _ in range(4)]
    held = eventually(lambda: _job_of(stack, "inferer-1"), "the second runs a job")
    second.kill()
    eventually(lambda: _ids(stack) == ["inferer-0"], "the dead one is gone")
    rerun = eventually(lambda: _second_attempt(stack, held), "its job runs again")
    assert rerun["inferer"] == "inferer-0"
    eventually(lambda: _limit(stack) == 1, "the limit is right again")
    for job_id in ids:
        assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
    limits = [event["limit"] for event in stack.gateways[0].events("consumer_set")]
    # Two looks at one moment may both set what both have seen.
    assert [limit for limit, _ in groupby(limits)] == [1, 2, 1]


async def test_the_fast_are_served_first(stack: Stack, tiny_model: Path) -> None:
    """One of a higher number takes only what the others cannot take at once."""
    stack.start_inferer(tiny_model, INFERER_PRIORITY="5")
    eventually(lambda: _limit(stack) == 2, "one for each")
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        for _ in range(6):
            while (await broker.js.consumer_info(subjects.REQUESTS, "tiny")).num_waiting != 2:
                await asyncio.sleep(0.01)
            job = stack.wait_for_end(stack.submit(prompt="x", max_tokens=1))
            assert job["inferer"] == "inferer-0"
    together = [stack.submit(prompt="go on", max_tokens=1500) for _ in range(2)]
    both = {stack.wait_for_end(job_id)["inferer"] for job_id in together}
    assert both == {"inferer-0", "inferer-1"}


def _limit(stack: Stack) -> int:
    (queue,) = stack.http.get("/queue").json()["models"]
    return int(queue["limit"])


def _job_of(stack: Stack, inferer: str) -> str | None:
    running = {entry["id"]: entry["jobs"] for entry in _inferers(stack)}
    return str(running[inferer][0]["id"]) if running.get(inferer) else None


def _second_attempt(stack: Stack, job_id: str) -> dict[str, Any] | None:
    status = stack.status(job_id)
    return status if status["attempts"] == 2 else None


def _inferers(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.http.get("/inferers").json()["inferers"]
    return found


def _ids(stack: Stack) -> list[str]:
    return [entry["id"] for entry in _inferers(stack)]


def _busy(stack: Stack) -> list[dict[str, Any]] | None:
    return [
        entry for entry in _inferers(stack) if entry["state"] == "busy" and entry["jobs"]
    ] or None


def _measured(stack: Stack) -> list[dict[str, Any]] | None:
    found = _inferers(stack)
    return [entry for entry in found if entry["tokens_per_s"] and entry["state"] == "idle"] or None


def _run(command: list[str]) -> str:
    return subprocess.run(
        command,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout
