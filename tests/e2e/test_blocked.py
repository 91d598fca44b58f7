"""Jobs that no inferer can start: their status says why, and what to do."""

import json
from typing import Any

import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from tests.support.processes import (
    PATIENCE_S,
    Stack,
    eventually,
    printed_by,
    scripts,
    server_sent_events,
)
from tests.support.terminal import Terminal, terminal

LONG = {"prompt": "tell me", "max_tokens": 4000, "seed": 1}  # does not end by itself
NO_INFERER = (
    "no live inferer: if none is starting, start one that serves tiny with `sluice up`, or see "
    "`sluice doctor`"
)
CLOSED = "all slots are closed: open some with `sluice concurrency 1 --model tiny`"


async def test_a_job_without_an_inferer_says_so(stack: Stack) -> None:
    """Over HTTP, as an event, over NATS; until an inferer comes. A job that can run says nothing
    of the kind."""
    running = stack.submit(**LONG)
    stack.wait_for_state(running, "STARTED")
    waiting = stack.submit(**LONG)
    assert "blocked_reason" not in stack.status(waiting)
    stack.http.delete(f"/jobs/{running}")
    stack.http.delete(f"/jobs/{waiting}")
    stack.inferers.pop().terminate()

    job_id = stack.submit(prompt="hi", max_tokens=5)
    assert blocked(stack, job_id) == NO_INFERER
    with stack.http.stream("GET", f"/jobs/{job_id}/events") as events:
        queued = next(server_sent_events(events))
    assert json.loads(queued["data"])["blocked_reason"] == NO_INFERER
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        answer = await broker.nc.request("infer.status", job_id.encode(), PATIENCE_S)
    assert json.loads(answer.data)["blocked_reason"] == NO_INFERER
    assert stack.http.get(f"/jobs/{job_id}").json()["status"]["blocked_reason"] == NO_INFERER


def test_a_job_beside_closed_slots_says_so(stack: Stack) -> None:
    """Until a slot is opened. The job that runs in a slot that is closing is not blocked."""
    running, waiting = stack.submit(**LONG), stack.submit(prompt="hi", max_tokens=5)
    stack.wait_for_state(running, "STARTED")
    stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    assert blocked(stack, waiting) == CLOSED
    assert "blocked_reason" not in stack.status(running)
    (queue,) = stack.http.get("/queue").json()["models"]
    assert (queue["inferers"], queue["slots"]) == (1, 0)
    heading, row = sluice(stack, "queue").splitlines()[:2]
    assert heading.split()[:6] == ["model", "waiting", "in", "flight", "slots", "inferers"]
    assert row.split()[:5] == ["tiny", "1", "1", "0", "1"]

    stack.http.put("/concurrency", json={"concurrency": 1}).raise_for_status()
    eventually(lambda: "blocked_reason" not in stack.status(waiting), "it can start")
    stack.http.delete(f"/jobs/{running}")
    assert "blocked_reason" not in stack.wait_for_end(waiting)


def test_a_job_that_lost_the_only_inferer_says_so(stack: Stack) -> None:
    """Its state is that of the attempt that was lost, STARTED."""
    job_id = stack.submit(**LONG)
    stack.wait_for_state(job_id, "STARTED")
    stack.inferers.pop().kill()
    assert blocked(stack, job_id) == NO_INFERER


@pytest.mark.parametrize("cause", ["no inferer", "closed"])
def test_commands_say_why_a_job_waits(stack: Stack, cause: str) -> None:
    """In place of `next to run`: `status`, and at a terminal those that wait."""
    if cause == "closed":
        stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    else:
        stack.inferers.pop().terminate()
    reason = CLOSED if cause == "closed" else NO_INFERER
    job_id = stack.submit(prompt="hi", max_tokens=5)
    assert blocked(stack, job_id) == reason
    printed = sluice(stack, "status", job_id)
    assert f"blocked    {reason}" in printed
    assert "next to run" not in printed
    for command in (
        ("follow", job_id),
        ("ask", "hi", "--max-tokens", "5"),
        ("submit", "hi", "--max-tokens", "5", "--wait"),
    ):
        with terminal(*command, "--url", stack.url) as shown:
            shows(shown, reason)
            assert "next to run" not in shown.output


def blocked(stack: Stack, job_id: str) -> str:
    """Why the job cannot start, once its status says so."""

    def read() -> str | None:
        status: dict[str, Any] = stack.status(job_id)
        assert status["state"] in ("PENDING", "STARTED")
        return status.get("blocked_reason")

    return eventually(read, "its status says why it cannot start")


def shows(shown: Terminal, text: str) -> None:
    """Wait until the terminal does; the text may be wrapped."""
    eventually(lambda: text in " ".join(shown.output.split()), f"{text!r} is shown")


def sluice(stack: Stack, *arguments: str) -> str:
    """What a command prints."""
    return printed_by([str(scripts() / "sluice"), *arguments, "--url", stack.url])
