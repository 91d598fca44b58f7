"""A job's position, progress and ETA, and what a full queue answers."""

import asyncio
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import milliseconds_between, timestamp
from shared.wire import subjects
from tests.support.processes import (
    PATIENCE_S,
    Stack,
    clean_environment,
    eventually,
    scripts,
    server_sent_events,
)
from tests.support.terminal import terminal

LONG = {"prompt": "tell me", "max_tokens": 4000, "seed": 1}  # does not end by itself


def test_positions_are_the_true_counts(stack: Stack) -> None:
    """How many will be served before it: earlier ones of its priority, and all of higher
    priorities; it falls as they are served and when one of them is cancelled."""
    first = stack.submit(**LONG)
    stack.wait_for_state(first, "STARTED")
    assert "position" not in stack.status(first)
    normal = [stack.submit(**LONG) for _ in range(4)]
    assert [stack.status(job_id)["position"] for job_id in normal] == [0, 1, 2, 3]
    low, high = (stack.submit(**LONG, priority=name) for name in ("low", "high"))
    assert stack.status(high)["position"] == 0
    assert [stack.status(job_id)["position"] for job_id in normal] == [1, 2, 3, 4]
    assert stack.status(low)["position"] == 5
    stack.http.delete(f"/jobs/{normal[1]}")
    stack.http.delete(f"/jobs/{high}")
    assert [stack.status(job_id)["position"] for job_id in (normal[0], normal[3])] == [0, 2]
    assert stack.status(low)["position"] == 3
    stack.http.delete(f"/jobs/{first}")
    stack.wait_for_state(normal[0], "STARTED")
    assert [stack.status(job_id)["position"] for job_id in normal[2:]] == [0, 1]


async def test_a_position_was_true_between_question_and_answer(stack: Stack) -> None:
    """While the queue moves: at most the jobs that had not started at the request, at least those
    that were still undelivered after the response."""
    ids = [stack.submit(prompt="go on", max_tokens=150) for _ in range(15)]
    printed: list[tuple[str, int, int]] = []
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        while True:
            asked_at = timestamp()
            status = stack.status(ids[-1])
            if status["state"] != "PENDING":
                break
            info = await broker.js.consumer_info("REQUESTS", "tiny")
            printed.append((asked_at, status["position"], (info.num_pending or 0) - 1))
    starts = [str(stack.wait_for_end(job_id)["started_at"]) for job_id in ids[:-1]]
    assert len({position for _, position, _ in printed}) > 3
    for asked_at, position, least in printed:
        assert least <= position <= sum(start > asked_at for start in starts)


def test_the_first_jobs_have_an_estimate(stack: Stack) -> None:
    """From the speed that the self-test measured; none while nobody serves the model. A position
    always."""
    first, second = stack.submit(**LONG), stack.submit(**LONG)
    running = stack.wait_for_state(first, "STARTED")
    assert running["eta"]["p50_s"] > 0
    waiting = stack.status(second)
    assert waiting["position"] == 0
    assert waiting["eta"]["p50_s"] > stack.status(first)["eta"]["p50_s"]
    stack.http.delete(f"/jobs/{second}")
    stack.http.delete(f"/jobs/{first}")
    stack.inferers[0].terminate()
    third = stack.submit(**LONG)
    status = eventually(lambda: without_eta(stack, third), "nobody is there to serve it")
    assert status["position"] == 0


def test_waiting_and_running_jobs_have_estimates_that_come_true(stack: Stack) -> None:
    """It counts those before it, comes nearer, and agrees with what happens in the end."""
    for _ in range(3):
        measure(stack)
    body = {"prompt": "go on", "max_tokens": 1500}
    ids = [stack.submit(**body) for _ in range(3)]
    asked = timestamp()
    etas = [stack.status(job_id)["eta"] for job_id in ids]
    assert 0 < etas[0]["p50_s"] < etas[1]["p50_s"] < etas[2]["p50_s"]
    for eta in etas:
        assert eta["p50_s"] <= eta["p90_s"]
        assert abs(milliseconds_between(asked, eta["at"]) / 1000 - eta["p50_s"]) < 5
    running = eventually(lambda: with_progress(stack, ids[0]), "it reports its progress")
    assert running["progress"]["max_tokens"] == 1500
    assert running["progress"]["prompt_tokens_left"] == 0
    assert running["eta"]["p50_s"] < etas[0]["p50_s"] + 1
    first, ended = stack.wait_for_end(ids[0]), stack.wait_for_end(ids[2])
    first_s, true_s = (
        milliseconds_between(asked, job["finished_at"]) / 1000 for job in (first, ended)
    )
    # How fast the machine is does not matter to this one.
    relative = (etas[2]["p50_s"] / etas[0]["p50_s"]) / (true_s / first_s)
    assert 1 / 4 < relative < 4
    # Generous: the machine is shared (7 was seen beside other tests), and speed is measured
    # elsewhere.
    assert true_s / 12 < etas[2]["p50_s"] < true_s * 12
    assert not {"eta", "position", "progress"} & ended.keys()


def test_every_gateway_gives_the_same_estimates(stack: Stack) -> None:
    """One that has just started has learned from the results that are stored."""
    measure(stack)
    stack.start_gateway()
    with httpx2.Client(base_url=stack.urls[1], timeout=PATIENCE_S) as other:
        eventually(lambda: is_ready(other), "the second gateway is ready")
        ids = [stack.submit(**LONG) for _ in range(2)]
        for job_id in ids:
            printed = other.get(f"/status/{job_id}").json()
            assert printed["eta"]["p50_s"] > 0
        with other.stream("GET", f"/jobs/{ids[1]}/events") as events:
            queued = next(server_sent_events(events))
        assert json.loads(queued["data"])["position"] == 0


def test_requeued_jobs_are_ahead_of_waiting_ones(stack: Stack) -> None:
    """The only inferer stops in the middle of a job: that one is next, the others are behind it."""
    first, second, high = (stack.submit(**LONG) for _ in range(3))
    stack.wait_for_state(first, "STARTED")
    assert stack.status(high)["position"] == 1
    stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    stack.inferers[0].kill()
    # Its entry speaks of the job until it has expired.
    eventually(lambda: stack.status(second)["position"] == 1, "the first comes back before it")
    assert stack.status(high)["position"] == 2
    jobs = {job["id"]: job for job in stack.http.get("/jobs").json()["jobs"]}
    assert [jobs[job_id].get("position") for job_id in (first, second, high)] == [None, 1, 2]


async def test_results_by_hand_are_ignored(stack: Stack) -> None:
    """A gateway starts all the same, and reports the ETA of others."""
    await asyncio.to_thread(measure, stack)
    result = (
        '{"outcome":"completed","id":"%s","model":"tiny","attempt":1,"queued_at":"x",'
        '"finished_at":"y","started_at":"z","inferer":"inferer-0","text":"","finish_reason":"stop",'
        '"timings":{"queued_ms":0},"usage":{"prompt_tokens":1,"completion_tokens":1,'
        '"total_tokens":2},"work":{"prompt_bytes":-1,"max_tokens":%d,"task":"chat"}}'
    )
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        for max_tokens in (0, 5):
            job_id = new_job_id()
            payload = (result % (job_id, max_tokens)).encode()
            await broker.js.publish(subjects.result("tiny", job_id), payload)
    stack.start_gateway()
    ids = [stack.submit(**LONG) for _ in range(2)]
    with httpx2.Client(base_url=stack.urls[1], timeout=PATIENCE_S) as other:
        await asyncio.to_thread(eventually, lambda: is_ready(other), "the gateway is ready")
        for url in (stack.http, other):
            assert url.get(f"/status/{ids[1]}").json()["eta"]["p50_s"] > 0


def test_a_backlog_is_shared_by_the_slots(stack: Stack, tiny_model: Path) -> None:
    """The same queue takes about half as long with a second inferer."""
    measure(stack)
    stack.submit(**LONG)
    ids = [stack.submit(**LONG) for _ in range(9)]
    before = stack.status(ids[-1])["eta"]["p50_s"]
    stack.start_inferer(tiny_model)
    stack.wait_until_served("tiny", inferers=2)
    after = eventually(lambda: sooner(stack, ids[-1], 0.8 * before), "it is expected sooner")
    assert after > 0.2 * before


@pytest.fixture
def full_stack(tmp_path: Path, tiny_model: Path) -> Any:
    """A stack in which three jobs may wait, and three do, behind one that runs."""
    with Stack(tmp_path) as running:
        running.start_gateway(GATEWAY_MAX_WAITING="3")
        running.start_inferer(tiny_model)
        running.wait_until_served("tiny")
        measure(running)
        first = running.submit(**LONG)
        running.wait_for_state(first, "STARTED")
        # Many at once: none gets in that would be one too many.
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda _: post(running), range(12)))
        assert set(answers) == {202, 429}
        assert waiting(running) <= 3
        while post(running) == 202:
            assert waiting(running) <= 3
        yield running


def test_a_full_queue_refuses_and_says_when_to_come_again(full_stack: Stack) -> None:
    """429 with whole seconds, over every door; nothing that was accepted is touched."""
    refused = full_stack.http.post("/jobs", json=LONG)
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert refused.headers["content-type"].startswith("application/problem+json")
    assert int(refused.headers["retry-after"]) >= 1
    assert "no more than 3 jobs may wait" in refused.json()["detail"]

    client = openai.OpenAI(base_url=f"{full_stack.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model="tiny", prompt="hi")
    assert raised.value.code == "queue_full"
    (queue,) = full_stack.http.get("/queue").json()["models"]
    assert (queue["max_waiting"], queue["in_flight"]) == (3, 1)
    assert queue["waiting"] <= 3


def test_the_retry_after_follows_the_backlog(full_stack: Stack) -> None:
    """When the queue has room again a job is accepted."""
    (running,) = full_stack.http.get("/inferers").json()["inferers"]
    eventually(lambda: running_job(full_stack), "the entry speaks of the job")
    full_stack.http.delete(f"/jobs/{running_job(full_stack)}")
    eventually(lambda: post(full_stack) == 202, "there is room again")
    assert running["id"] == "inferer-0"


def test_a_command_that_waits_counts_down(stack: Stack) -> None:
    """`submit --wait` on a terminal shows where the job is and when it will be done, and ends with
    its result; `status` says the same."""
    measure(stack)
    ids = [stack.submit(**LONG) for _ in range(3)]
    stack.wait_for_state(ids[0], "STARTED")
    printed = subprocess.run(
        [str(scripts() / "sluice"), "status", ids[2], "--url", stack.url],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    ).stdout
    assert "1 ahead of it, done in about " in printed
    command = ("submit", "hi", "--raw", "--max-tokens", "5", "--wait", "--url", stack.url)
    with terminal(*command) as shown:
        # The whole line fits into the 80 columns of the terminal.
        line = re.compile(r"2 ahead of it, done in about \d+ s \(90 %: \d+ s\)")
        eventually(lambda: line.search(shown.output), "it counts down")
        for job_id in reversed(ids):
            stack.http.delete(f"/jobs/{job_id}")
        assert shown.process.wait(PATIENCE_S) == 0
        assert "SUCCESS" in shown.output


def waiting(stack: Stack) -> int:
    (queue,) = stack.http.get("/queue").json()["models"]
    return int(queue["waiting"])


def post(stack: Stack) -> int:
    return stack.http.post("/jobs", json=LONG).status_code


def measure(stack: Stack) -> None:
    """Let the gateways learn how fast the inferers are."""
    job = stack.wait_for_end(stack.submit(prompt="hello", max_tokens=200))
    assert job["state"] == "SUCCESS"


def without_eta(stack: Stack, job_id: str) -> dict[str, Any] | None:
    status = stack.status(job_id)
    return None if "eta" in status else status


def test_the_status_shows_how_much_of_a_long_prompt_is_left(stack: Stack, tiny_model: Path) -> None:
    stack.inferers.pop().terminate()
    stack.start_inferer(tiny_model, INFERER_N_CTX="65536")
    stack.wait_until_served("tiny")
    job_id = stack.submit(prompt="word " * 60_000, max_tokens=1)

    def prompt_tokens_left() -> int | None:
        progress: dict[str, int] = stack.status(job_id).get("progress", {})
        return progress.get("prompt_tokens_left")

    left = eventually(prompt_tokens_left, "part of the prompt is left")
    assert 0 < left <= 60_001
    command = [str(scripts() / "sluice"), "status", job_id, "--url", stack.url]
    shown = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert "tokens of the prompt left" in shown.stdout
    stack.http.delete(f"/jobs/{job_id}")


def with_progress(stack: Stack, job_id: str) -> dict[str, Any] | None:
    status = stack.status(job_id)
    return status if status.get("progress", {}).get("completion_tokens") else None


def is_ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def sooner(stack: Stack, job_id: str, than_s: float) -> float | None:
    p50_s = float(stack.status(job_id)["eta"]["p50_s"])
    return p50_s if p50_s < than_s else None


def running_job(stack: Stack) -> str | None:
    jobs = [job for one in stack.http.get("/inferers").json()["inferers"] for job in one["jobs"]]
    return str(jobs[0]["id"]) if jobs else None
