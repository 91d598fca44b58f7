"""The fleet as gateways, NATS clients and the command see it."""

import json
import subprocess
from pathlib import Path
from typing import Any

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
