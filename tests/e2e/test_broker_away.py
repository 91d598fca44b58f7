"""The broker dies and comes back: nothing is lost, and everybody serves again by themselves."""

import asyncio
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nats.js.api import RetentionPolicy, StorageType, StreamConfig

from shared.broker.connection import Broker
from tests.support.processes import (
    PATIENCE_S,
    ROOT,
    NatsServer,
    Stack,
    clean_environment,
    eventually,
    free_port,
)

FROZEN_S = 16.0
"""Leases are 12 s."""


def test_requests_are_refused_while_the_broker_is_away(stack: Stack) -> None:
    """503 with Retry-After in the shape of each route, alive but not ready; then it serves."""
    stack.nats.process.kill()
    eventually(lambda: _status(stack, "/readyz") == 503, "the gateway has noticed")
    assert _status(stack, "/healthz") == 200

    body = {"prompt": "hi", "max_tokens": 2}
    for path in ("/jobs", "/v1/completions"):
        _assert_unavailable(stack.http.post(path, json=body))
    _assert_unavailable(stack.http.post("/v1/completions", json={**body, "stream": True}))
    job_id = "01890000-0000-7000-8000-000000000000"
    for path in ("/queue", "/v1/models", f"/status/{job_id}", f"/jobs/{job_id}/events"):
        _assert_unavailable(stack.http.get(path))
    _assert_unavailable(stack.http.delete(f"/jobs/{job_id}"))
    assert not stack.gateways[0].events("request_accepted")

    stack.nats.start()
    eventually(lambda: _status(stack, "/readyz") == 200, "the gateway is ready again")
    assert stack.wait_for_end(stack.submit(**body))["state"] == "SUCCESS"
    for process in (*stack.gateways, *stack.inferers):
        process.wait_for("broker_disconnected")
        process.wait_for("broker_reconnected")
        assert "Traceback" not in process.output()


def test_jobs_outlive_the_broker(stack: Stack) -> None:
    """kill -9 with one job running and three waiting: each completes once, in its order."""
    ids = [stack.submit(prompt="long", max_tokens=1500)]
    ids += [stack.submit(prompt=f"job {number}", max_tokens=5) for number in range(3)]
    stack.wait_for_state(ids[0], "STARTED")
    stack.nats.process.kill()
    eventually(lambda: _status(stack, "/readyz") == 503, "the gateway has noticed")
    stack.nats.start()
    eventually(lambda: _status(stack, "/readyz") == 200, "the gateway is ready again")
    ended = [stack.wait_for_end(job_id) for job_id in ids]
    assert [job["state"] for job in ended] == ["SUCCESS"] * 4
    assert [job["attempts"] for job in ended] == [1] * 4
    # One may be delivered twice, as the broker lost what it had not written; it ran once.

    def printed() -> list[str] | None:
        finished = [event["job_id"] for event in stack.inferers[0].events("job_finished")]
        once = list(dict.fromkeys(finished))
        return once if len(once) == len(ids) else None

    assert eventually(printed, "each is printed, a moment after its result") == ids


@pytest.mark.parametrize("fault", ["restarted in good order", "frozen for longer than a lease"])
def test_jobs_outlive_every_outage_of_the_broker(stack: Stack, fault: str) -> None:
    """With one job running, two waiting, and clients that wait for the first and for the last:
    each is started and ends once, and both clients get their answers."""
    with ThreadPoolExecutor() as clients:
        first = clients.submit(_answer, stack, prompt="long", max_tokens=1500)
        eventually(lambda: _queue(stack)["in_flight"] == 1, "the first one runs")
        waiting = [stack.submit(prompt=f"job {number}", max_tokens=5) for number in range(2)]
        last = clients.submit(_answer, stack, prompt="last", max_tokens=5)
        eventually(lambda: _queue(stack)["waiting"] == 3, "the last one waits")
        if fault == "restarted in good order":
            assert stack.nats.process.terminate() == 0
            stack.nats.start()
        else:
            stack.nats.process.popen.send_signal(signal.SIGSTOP)
            eventually(lambda: _is_frozen(stack.nats.process.pid), "its threads stand still")
            thaw_at = time.monotonic() + FROZEN_S
            _assert_unavailable(stack.http.post("/jobs", json={"prompt": "hi"}))
            eventually(lambda: _status(stack, "/readyz") == 503, "the gateway has noticed")
            time.sleep(max(0, thaw_at - time.monotonic()))
            stack.nats.process.popen.send_signal(signal.SIGCONT)
        answers = [first.result(PATIENCE_S), last.result(PATIENCE_S)]
    ended = [*answers, *(stack.wait_for_end(job_id) for job_id in waiting)]
    assert [(job["state"], job["attempts"]) for job in ended] == [("SUCCESS", 1)] * 4
    eventually(lambda: _status(stack, "/readyz") == 200, "the gateway is ready again")
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    for process in (*stack.gateways, *stack.inferers):
        assert "Traceback" not in process.output()


def test_a_waiting_client_is_answered_after_an_outage(stack: Stack) -> None:
    """A job that finishes while the broker is away is stored and sent when it is back."""
    with httpx2.Client(base_url=stack.url, timeout=PATIENCE_S) as patient:
        job_id = stack.submit(prompt="long", max_tokens=1000)
        with patient.stream("GET", f"/jobs/{job_id}/events") as response:
            lines = response.iter_lines()
            assert next(lines)
            stack.wait_for_state(job_id, "STARTED")
            stack.nats.process.kill()
            eventually(
                lambda: stack.inferers[0].events("broker_awaited") or None, "it wants to store"
            )
            stack.nats.start()
            assert "event: result" in list(lines)
    assert stack.status(job_id)["attempts"] == 1


def test_a_broker_that_comes_back_empty_is_prepared_again(stack: Stack) -> None:
    """Its data was lost: everything is made anew, and the same processes serve again."""
    stack.nats.process.kill()
    eventually(lambda: _status(stack, "/readyz") == 503, "the gateway has noticed")
    stack.nats.wipe()
    stack.nats.start()
    stack.wait_until_served("tiny")
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    for process in (*stack.gateways, *stack.inferers):
        assert "Traceback" not in process.output()


def test_a_stack_started_while_the_broker_is_away_serves_once_it_is_there(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Gateway and inferer wait for it, the gateway says so, and then both serve."""
    with Stack(tmp_path) as stack:
        stack.nats.process.kill()
        stack.start_gateway()
        stack.start_inferer(tiny_model)
        eventually(lambda: _status(stack, "/healthz") == 200, "the gateway listens")
        _assert_unavailable(stack.http.get("/readyz"))
        _assert_unavailable(stack.http.post("/jobs", json={"prompt": "hi"}))
        stack.nats.start()
        stack.wait_until_served("tiny")
        assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"


INCOMPATIBLE = {
    "REQUESTS that is not a work queue": (
        StreamConfig(name="REQUESTS", subjects=["infer.requests.*.*.*.*"]),
        ("REQUESTS", "retention is limits, should be workqueue", "nats stream rm REQUESTS"),
    ),
    "RESULTS in memory": (
        StreamConfig(name="RESULTS", subjects=["infer.results.*.*"], storage=StorageType.MEMORY),
        ("RESULTS", "storage is memory, should be file", "nats stream rm RESULTS"),
    ),
    "somebody else's stream on our subjects": (
        StreamConfig(name="THEIRS", subjects=["infer.>"], retention=RetentionPolicy.INTEREST),
        ("REQUESTS", "subjects overlap"),
    ),
}


@pytest.mark.parametrize("kind", INCOMPATIBLE)
async def test_a_broker_that_holds_something_incompatible_ends_the_gateway_with_a_reason(
    nats_server: NatsServer, broker: Broker, kind: str
) -> None:
    """The gateway exits with status 2 and one line that says what is wrong with which stream."""
    held, named = INCOMPATIBLE[kind]
    await broker.js.add_stream(held)
    ended = await asyncio.to_thread(_run_gateway, nats_server.url)
    assert ended.returncode == 2, ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith("gateway: ")
    for text in named:
        assert text in line


def _answer(stack: Stack, **body: Any) -> dict[str, Any]:
    """What a client gets that submits a job and waits for its end."""
    answer = httpx2.post(
        f"{stack.url}/jobs",
        json=body,
        headers={"prefer": f"wait={PATIENCE_S:.0f}"},
        timeout=2 * PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _queue(stack: Stack) -> dict[str, Any]:
    (found,) = stack.http.get("/queue").json()["models"]
    assert isinstance(found, dict)
    return found


def _is_frozen(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(task.read_text().rpartition(") ")[2].startswith("T") for task in tasks)


def _run_gateway(nats_url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        cwd=ROOT,
        env={**clean_environment(), "NATS_URL": nats_url, "GATEWAY_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def _status(stack: Stack, path: str) -> int | None:
    try:
        return stack.http.get(path).status_code
    except httpx2.TransportError:
        return None


def _assert_unavailable(answer: httpx2.Response) -> None:
    """503, in the shape of the route, with a whole number of seconds to wait."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    if answer.request.url.path.startswith("/v1/"):
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "broker_unavailable"
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["status"], problem["code"]) == (503, "broker_unavailable")
        assert problem["detail"]
        assert problem["instance"] == answer.request.url.path
