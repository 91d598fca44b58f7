"""Jobs through the whole pipeline: real broker, real processes, the tiny model."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import threading
import time

import httpx2
import pytest

from shared.broker.connection import connected
from shared.broker.results import store_result
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import TokenFrame
from shared.wire.results import Completed, Usage
from tests.support.processes import Stack, eventually, server_sent_events


def test_ten_jobs_run_one_after_another_in_their_order(stack: Stack, nats_command: str) -> None:
    """One inferer: no two jobs overlap, none overtakes, and the broker never lets two out."""
    outstanding, limits, watching = [0], set[int](), threading.Event()

    def watch() -> None:
        while not watching.is_set():
            shown = subprocess.run(
                [nats_command, "-s", stack.nats.url, "consumer", "info", "REQUESTS", "tiny", "-j"],
                capture_output=True,
                check=True,
            )
            info = json.loads(shown.stdout)
            outstanding.append(info["num_ack_pending"])
            limits.add(info["config"]["max_ack_pending"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    ids = [stack.submit(prompt=f"job {number}", max_tokens=150) for number in range(10)]
    ended = [stack.wait_for_end(job_id) for job_id in ids]
    watching.set()
    watcher.join()

    assert [job["state"] for job in ended] == ["SUCCESS"] * 10
    for before, after in itertools.pairwise(ended):
        assert before["finished_at"] <= after["started_at"]
    assert max(outstanding) == 1
    assert limits == {1}


def test_high_before_normal_before_low(stack: Stack) -> None:
    """Strictly between priorities, first in first out within one, also in status and queue."""
    first = stack.submit(prompt="go on", max_tokens=400)
    stack.wait_for_state(first, "STARTED")
    ids = {
        (priority, number): stack.submit(prompt="x", max_tokens=1, priority=priority)
        for number in range(3)
        for priority in ("low", "normal", "high")
    }
    (queue,) = stack.http.get("/queue").json()["models"]
    assert queue["waiting"] == 9
    assert {name: one["waiting"] for name, one in queue["classes"].items()} == {
        "high": 3,
        "normal": 3,
        "low": 3,
    }
    assert stack.status(ids["low", 0])["priority"] == "low"
    ended = {name: stack.wait_for_end(job_id) for name, job_id in ids.items()}
    served = sorted(ended, key=lambda name: str(ended[name]["started_at"]))
    assert served == [(p, n) for p in ("high", "normal", "low") for n in range(3)]
    assert {status["priority"] for status in ended.values()} == {"high", "normal", "low"}


def test_cancel_finds_jobs_of_every_priority(stack: Stack) -> None:
    """One that waits is off the queue at once, whatever its priority."""
    first = stack.submit(prompt="go on")
    stack.wait_for_state(first, "STARTED")
    ids = [stack.submit(prompt="x", priority=name) for name in ("high", "normal", "low")]
    for job_id in ids:
        assert stack.http.delete(f"/jobs/{job_id}").json()["state"] == "REVOKED"
    (queue,) = stack.http.get("/queue").json()["models"]
    assert (queue["waiting"], queue["in_flight"]) == (0, 1)
    stack.http.delete(f"/jobs/{first}")


def test_submit_answers_with_where_to_look(shared_stack: Stack) -> None:
    """202 with Location; the status then carries every field that is promised."""
    answer = shared_stack.http.post("/jobs", json={"prompt": "hello", "max_tokens": 3})
    assert answer.status_code == 202
    accepted = answer.json()
    assert answer.headers["location"] == accepted["status_url"] == f"/status/{accepted['id']}"
    assert accepted["events_url"] == f"/jobs/{accepted['id']}/events"
    assert answer.headers["x-request-id"]

    status = shared_stack.wait_for_end(accepted["id"])
    assert status["state"] == "SUCCESS"
    assert status["model"] == "tiny"
    assert status["attempts"] == 1
    assert status["inferer"] == "inferer-0"
    assert status["queued_at"] <= status["started_at"] <= status["finished_at"]
    assert len(status["queued_at"]) == len("2026-01-31T12:00:00.000000Z")
    assert status["error"] is None
    assert status["result"]["usage"]["completion_tokens"] == 3
    assert status["result"]["finish_reason"] == "length"
    assert "message" not in status["result"]


def test_prefer_wait_answers_with_the_result(shared_stack: Stack) -> None:
    """`Prefer: wait=N` gives 200 with the status when it comes in time, and 202 when not."""
    in_time = shared_stack.http.post(
        "/jobs",
        json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        headers={"prefer": "wait=30"},
    )
    assert in_time.status_code == 200
    assert in_time.headers["preference-applied"] == "wait=30"
    status = in_time.json()
    assert status["state"] == "SUCCESS"
    assert status["result"]["message"] == {
        "role": "assistant",
        "content": status["result"]["text"],
    }

    late = shared_stack.http.post(
        "/jobs", json={"prompt": "hi", "max_tokens": 4000}, headers={"prefer": "wait=1"}
    )
    if late.status_code == 202:  # the machine may be fast enough for 4,000 tokens
        shared_stack.http.delete(f"/jobs/{late.json()['id']}")


def test_preferences_are_read_as_rfc_7240_says(shared_stack: Stack) -> None:
    """The first `wait` counts, also of several headers; quoted commas separate nothing; what cannot
    be read is ignored and not named as applied."""
    body = {"prompt": "hi", "max_tokens": 1}
    sent = [
        ([("prefer", "wait=30, wait=0"), ("prefer", "wait=soon")], 200, "wait=30"),
        ([("prefer", 'x="a, wait=0"; y, WAIT="30"')], 200, "wait=30"),
        ([("prefer", "respond-async"), ("prefer", "wait=0")], 202, "respond-async, wait=0"),
        ([("prefer", "wait=soon, handling=lenient")], 202, None),
        ([("prefer", "wait=99999999999999999999")], 200, "wait=86400"),
    ]
    for headers, status, applied in sent:
        answer = shared_stack.http.post("/jobs", json=body, headers=headers)
        assert answer.status_code == status, (headers, answer.text)
        assert answer.headers.get("preference-applied") == applied


def test_the_same_seed_gives_the_same_text(shared_stack: Stack) -> None:
    """A seed decides the answer, also after other jobs have used the context."""
    bodies = [{"prompt": "once", "seed": seed, "max_tokens": 20} for seed in (1, 2, 1)]
    ids = [shared_stack.submit(**body) for body in bodies]
    first, other, again = (shared_stack.wait_for_end(i)["result"]["text"] for i in ids)
    assert first == again
    assert first != other


def test_events_report_the_whole_life_and_resume(shared_stack: Stack) -> None:
    """queued, started, tokens, result; after Last-Event-ID only what is missing; text adds up."""
    job_id = shared_stack.submit(prompt="tell me", max_tokens=120)
    path = f"/jobs/{job_id}/events"
    with shared_stack.http.stream("GET", path) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(server_sent_events(response))
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "result"
    assert set(kinds[2:-1]) == {"tokens"}
    assert events[-1]["id"] == "end"
    text = shared_stack.status(job_id)["result"]["text"]
    assert _text(events) == text

    for position, event in enumerate(events[:-1]):
        headers = {"last-event-id": event["id"]}
        with shared_stack.http.stream("GET", path, headers=headers) as response:
            rest = list(server_sent_events(response))
        assert _text(events[: position + 1]) + _text(rest) == text
        assert rest[-1]["event"] == "result"
    ended = shared_stack.http.get(path, headers={"last-event-id": "end"})
    assert ended.status_code == 204


@pytest.mark.parametrize("text", ["xyz", "x"], ids=["a frame differs", "the result differs"])
async def test_events_resume_wherever_they_were_cut_off(shared_stack: Stack, text: str) -> None:
    """A second attempt came out differently: after any event, what follows it makes the text."""
    job_id = new_job_id()
    frames = [(1, 0, ["a"]), (1, 1, ["b"]), (2, 0, ["x", "y"])][: 3 if text == "xyz" else 2]
    result = Completed(
        id=job_id,
        model="tiny",
        attempt=2,
        queued_at=timestamp(),
        finished_at=timestamp(),
        text=text,
        finish_reason="stop",
        usage=Usage(1, 3, 4),
    )
    async with connected(BrokerSettings(url=shared_stack.nats.url), "test") as broker:
        for attempt, index, tokens in frames:
            frame = TokenFrame(attempt=attempt, index=index, tokens=tokens)
            await broker.js.publish(subjects.token_events("tiny", job_id), encode(frame))
        await store_result(broker, result, patience_s=5)
    whole = await asyncio.to_thread(_events, shared_stack, job_id)
    assert "retrying" in [event["event"] for event in whole]
    assert _text(whole) == text
    for cut in range(1, len(whole)):
        rest = await asyncio.to_thread(_events, shared_stack, job_id, whole[cut - 1]["id"])
        assert _text(whole[:cut] + rest) == text, f"cut off after {cut} events"


def test_a_waiting_and_a_running_job_can_be_cancelled(stack: Stack) -> None:
    """Both end as REVOKED, the queue goes on, and a second cancel changes nothing."""
    running = stack.submit(prompt="long", max_tokens=4000)
    waiting = stack.submit(prompt="waits", max_tokens=5)
    last = stack.submit(prompt="last", max_tokens=5)
    stack.wait_for_state(running, "STARTED")

    assert stack.http.delete(f"/jobs/{waiting}").json()["state"] == "REVOKED"
    assert stack.http.delete(f"/jobs/{running}").json()["state"] == "REVOKED"
    assert stack.wait_for_end(last)["state"] == "SUCCESS"
    again = stack.http.delete(f"/jobs/{running}")
    assert (again.status_code, again.json()["error"]["code"]) == (200, "cancelled")
    assert stack.status(waiting)["started_at"] is None


def test_a_client_that_hangs_up_cancels_its_job(stack: Stack) -> None:
    """Only the hang-up of a waiting submit cancels; not one that asked for respond-async."""
    # As many as outlast this on a machine that is busy.
    blockers = [stack.submit(prompt="blocker", max_tokens=4000) for _ in range(10)]
    eventually(lambda: set(blockers) <= _known_jobs(stack), "all are in the log")
    headers = {"prefer": "wait=60"}
    for extra, state in (("", "REVOKED"), (", respond-async", "PENDING")):
        with httpx2.Client(base_url=stack.url) as impatient:
            known = _known_jobs(stack)
            with contextlib.suppress(httpx2.ReadTimeout):
                impatient.post(
                    "/jobs",
                    json={"prompt": "nobody waits", "max_tokens": 2},
                    headers={"prefer": headers["prefer"] + extra},
                    timeout=0.5,
                )
        job_id = _accepted_since(stack, known)
        stack.wait_for_state(job_id, state)
    for blocker in blockers:
        stack.http.delete(f"/jobs/{blocker}")


def _accepted_since(stack: Stack, known: set[str]) -> str:
    return eventually(lambda: next(iter(_known_jobs(stack) - known), None), "accepted")


def _known_jobs(stack: Stack) -> set[str]:
    return {event["job_id"] for event in stack.gateways[0].events("request_accepted")}


def test_an_openai_stream_that_is_dropped_cancels_its_job(stack: Stack) -> None:
    """Closing the connection in the middle of a stream stops the inference."""
    body = {"prompt": "go on", "max_tokens": 4000, "stream": True}
    with stack.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    job_id = stack.gateways[0].wait_for("request_accepted")["job_id"]
    ended = stack.wait_for_end(job_id)
    assert (ended["state"], ended["error"]["code"]) == ("REVOKED", "client_disconnected")


def test_a_reader_of_events_that_goes_away_cancels_nothing(stack: Stack) -> None:
    """Readers of /jobs/<id>/events change nothing."""
    job_id = stack.submit(prompt="go on", max_tokens=1000)
    with stack.http.stream("GET", f"/jobs/{job_id}/events") as response:
        next(response.iter_lines())
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


def test_a_gateway_that_stops_cancels_nothing(stack: Stack) -> None:
    """It ends its streams, exits 0 within seconds, and the job goes on."""
    job_id = stack.submit(prompt="go on", max_tokens=3000)
    started = threading.Event()
    seen: list[str] = []

    def read() -> None:
        with httpx2.stream("GET", f"{stack.url}/jobs/{job_id}/events", timeout=60) as response:
            for event in server_sent_events(response):
                seen.append(event["event"])
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    stack.wait_for_state(job_id, "STARTED")
    stopping_at = time.monotonic()
    assert stack.gateways[0].terminate() == 0
    assert time.monotonic() - stopping_at < 15
    reader.join(30)
    assert not reader.is_alive()

    port = stack.url.rpartition(":")[2]
    stack.start_gateway(GATEWAY_PORT=port)
    eventually(lambda: _is_ready(stack.url), "the new gateway is ready")
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def test_the_queue_counts_waiting_and_running_jobs(stack: Stack) -> None:
    """`GET /queue` counts what waits and what runs, with the limit, the inferers and the age."""
    ids = [stack.submit(prompt="long", max_tokens=4000) for _ in range(3)]
    stack.wait_for_state(ids[0], "STARTED")
    (queue,) = stack.http.get("/queue").json()["models"]
    assert queue["oldest_s"] > 0
    printed = {name: queue[name] for name in ("model", "waiting", "in_flight", "limit", "inferers")}
    assert printed == {"model": "tiny", "waiting": 2, "in_flight": 1, "limit": 1, "inferers": 1}
    for job_id in reversed(ids):
        stack.http.delete(f"/jobs/{job_id}")


def _events(stack: Stack, job_id: str, after: str = "") -> list[dict[str, str]]:
    headers = {"last-event-id": after} if after else {}
    with stack.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        return list(server_sent_events(response))


def _text(events: list[dict[str, str]]) -> str:
    """What a reader of these events is left with."""
    text = ""
    for event in events:
        if event["event"] == "retrying":
            text = ""
        elif event["event"] == "tokens":
            text += json.loads(event["data"])["text"]
    return text


def test_the_openapi_document_is_served(shared_stack: Stack) -> None:
    """It is made when somebody asks for it, from every type that a route takes or gives."""
    document = shared_stack.http.get("/schema/openapi.json")
    assert document.status_code == 200
    assert {"JobSubmission", "JobStatus", "ChatRequest"} <= document.json()["components"][
        "schemas"
    ].keys()
