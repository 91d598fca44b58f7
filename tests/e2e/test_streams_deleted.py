"""Streams and consumers that somebody deletes while everything runs are made again."""

import asyncio
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shared.broker.connection import Broker, connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology, missing_streams, recreated_streams
from shared.config import BrokerSettings
from shared.wire import subjects
from tests.support.processes import PATIENCE_S, Stack, eventually

OTHERS = ("RESULTS", "EVENTS", "DEAD", "KV_INFERERS", "KV_IDEMPOTENCY")


def test_jobs_outlive_the_loss_of_all_streams_but_the_queue(stack: Stack) -> None:
    """With a job that runs, its caller and a reader of its events: it ends once, both get its end,
    and everything is served as before. The log names what was missing."""
    with ThreadPoolExecutor() as clients:
        job_id = stack.submit(prompt="long", max_tokens=1500)
        opened = threading.Event()
        reader = clients.submit(_events, stack, job_id, opened)
        assert opened.wait(PATIENCE_S)
        stack.wait_for_state(job_id, "STARTED")
        _delete(stack, *OTHERS)
        assert "event: result" in reader.result(PATIENCE_S)
    ended = stack.wait_for_end(job_id)
    assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
    eventually(lambda: not _missing(stack), "all are there again")
    printed = stack.gateways[0].events("streams_missing")
    assert {name for event in printed for name in event["streams"]} == set(OTHERS)
    stack.wait_until_served("tiny")
    for _ in range(2):
        answer = stack.http.post(
            "/jobs", json={"prompt": "hi", "max_tokens": 2}, headers={"idempotency-key": "k"}
        )
        assert answer.status_code == 202, answer.text
        assert stack.wait_for_end(answer.json()["id"])["state"] == "SUCCESS"
    assert "event: tokens" in _events(stack, answer.json()["id"])
    _assert_alive(stack)


def test_jobs_are_unknown_once_their_results_are_deleted(stack: Stack) -> None:
    """Nothing is known of them any more: 404, and nobody waits for ever."""
    job_id = stack.submit(prompt="hi", max_tokens=2)
    stack.wait_for_end(job_id)
    _delete(stack, "RESULTS")
    eventually(lambda: stack.http.get(f"/status/{job_id}").status_code == 404, "it is unknown")
    assert stack.http.get(f"/jobs/{job_id}/events").status_code == 404
    _assert_alive(stack)


def test_the_loss_of_the_queue_is_reported_and_new_jobs_run(stack: Stack) -> None:
    """The job that runs ends with its result. Those that waited are gone, and whoever waits for one
    gets an error: over HTTP, as a stream, under /v1 and over NATS. New jobs run."""
    with ThreadPoolExecutor() as clients:
        running = stack.submit(prompt="long", max_tokens=1500)
        opened, lost_opened = threading.Event(), threading.Event()
        first = clients.submit(_events, stack, running, opened)
        stack.wait_for_state(running, "STARTED")
        lost = stack.submit(prompt="lost")
        callers = [
            clients.submit(_post, stack, "/jobs", prompt="lost"),
            clients.submit(_post, stack, "/v1/completions", prompt="lost"),
            clients.submit(_post, stack, "/v1/completions", prompt="lost", stream=True),
        ]
        reader = clients.submit(_events, stack, lost, lost_opened)
        over_nats = clients.submit(_chat, stack)
        eventually(lambda: _queue(stack)["waiting"] == 5, "they wait")
        assert opened.wait(PATIENCE_S)
        assert lost_opened.wait(PATIENCE_S)
        _delete(stack, subjects.REQUESTS)
        assert "event: error" in reader.result(PATIENCE_S)
        assert "event: result" in first.result(PATIENCE_S)
        assert [caller.result(PATIENCE_S).status_code for caller in callers[:2]] == [404, 404]
        assert "job_not_found" in callers[2].result(PATIENCE_S).text
        assert over_nats.result(PATIENCE_S) == "404"
    stack.wait_until_served("tiny")
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    _assert_alive(stack)


@pytest.mark.parametrize("deleted", [("tiny",), ("tiny+high", "tiny+low"), ("tiny", "tiny+high")])
def test_consumers_that_were_deleted_are_created_again(
    stack: Stack, deleted: tuple[str, ...]
) -> None:
    """One, or several, beside a job that runs and one of each priority that waits: all end."""
    ids = [stack.submit(prompt="long", max_tokens=800)]
    stack.wait_for_state(ids[0], "STARTED")
    ids += [stack.submit(prompt="hi", max_tokens=2, priority=rank) for rank in subjects.PRIORITIES]
    _on_the_broker(stack, lambda broker: _delete_consumers(broker, deleted))
    assert [stack.wait_for_end(job_id)["state"] for job_id in ids] == ["SUCCESS"] * 4
    _assert_alive(stack)


async def test_doctor_knows_streams_that_were_created_again(broker: Broker) -> None:
    """By its age, for `sluice doctor`."""
    topology = Topology()
    await ensure_topology(broker, topology, [])
    assert await missing_streams(broker, topology) == []
    await broker.js.delete_stream("DEAD")
    assert await missing_streams(broker, topology) == ["DEAD"]
    await ensure_topology(broker, topology, [])
    assert await recreated_streams(broker, topology) == {}  # within a minute


FROZEN_S = 75.0


def test_submits_while_the_broker_is_frozen_are_reported_as_unknown(
    tmp_path: Path, tiny_model: Path
) -> None:
    """For longer than anybody waits: each caller learns that it is not known whether its job was
    accepted, and none of them has another end than `cancelled`."""
    with Stack(tmp_path) as stack:
        gateway = stack.start_gateway(GATEWAY_MODELS="tiny", GATEWAY_PUBLISH_PATIENCE_S="2")
        gateway.wait_for("gateway_ready")
        stack.nats.process.popen.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        with ThreadPoolExecutor() as clients:
            callers = [
                clients.submit(_post, stack, "/jobs", prompt="hi", model="tiny") for _ in range(5)
            ]
        answers = [caller.result() for caller in callers]
        assert {answer.status_code for answer in answers} == {503}
        details = [answer.json()["detail"] for answer in answers]
        unknown = [detail for detail in details if "nothing was accepted" not in detail]
        assert unknown
        assert all("is not known" in detail for detail in unknown)
        time.sleep(max(0.0, FROZEN_S - (time.monotonic() - frozen_at)))
        stack.nats.process.popen.send_signal(signal.SIGCONT)
        for number in range(len(unknown)):
            gateway.wait_for("job_withdrawn", number + 1)
        assert _queue(stack)["waiting"] == 0
        for event in gateway.events("job_withdrawn"):
            assert stack.status(event["job_id"])["state"] == "REVOKED"
        stack.start_inferer(tiny_model)
        stack.wait_until_served("tiny")
        assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
        stack.inferers[0].wait_for("job_finished")  # logged after the result can be read
        assert len(stack.inferers[0].events("job_finished")) == 1


def _assert_alive(stack: Stack) -> None:
    for process in (*stack.gateways, *stack.inferers):
        assert process.popen.poll() is None
        assert "Traceback" not in process.output()


def _events(stack: Stack, job_id: str, opened: threading.Event | None = None) -> str:
    """All of them; ``opened`` is set when the first has come."""
    lines = []
    url = f"{stack.url}/jobs/{job_id}/events"
    with httpx2.stream("GET", url, timeout=2 * PATIENCE_S) as response:
        for line in response.iter_lines():
            lines.append(line)
            if opened is not None:
                opened.set()
    return "\n".join(lines)


def _post(stack: Stack, path: str, **body: Any) -> httpx2.Response:
    headers = {"prefer": f"wait={PATIENCE_S:.0f}"} if path == "/jobs" else {}
    return httpx2.post(f"{stack.url}{path}", json=body, headers=headers, timeout=2 * PATIENCE_S)


def _chat(stack: Stack) -> str:
    """The code of the error that a caller over NATS gets."""

    async def chat(broker: Broker) -> str:
        body = {"messages": [{"role": "user", "content": "lost"}]}
        answer = await broker.nc.request("infer.chat", json.dumps(body).encode(), PATIENCE_S)
        return (answer.headers or {}).get("Nats-Service-Error-Code", "")

    return str(_on_the_broker(stack, chat))


def _on_the_broker(stack: Stack, work: Any) -> Any:
    async def run() -> Any:
        async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
            return await work(broker)

    return asyncio.run(run())


def _delete(stack: Stack, *streams: str) -> None:
    async def delete(broker: Broker) -> None:
        for stream in streams:
            await broker.js.delete_stream(stream)

    _on_the_broker(stack, delete)


async def _delete_consumers(broker: Broker, names: tuple[str, ...]) -> None:
    for name in names:
        await broker.js.delete_consumer(subjects.REQUESTS, name)


def _missing(stack: Stack) -> list[str]:
    found: list[str] = _on_the_broker(stack, lambda broker: missing_streams(broker, Topology()))
    return found


def _queue(stack: Stack) -> dict[str, Any]:
    (found,) = stack.http.get("/queue").json()["models"]
    assert isinstance(found, dict)
    return found
