"""W3C trace context: what a request says of its trace is on all that is stored of its job."""

import json
from pathlib import Path
from typing import Any

import nats
import pytest

from shared.broker.connection import Broker, connected
from shared.broker.stored_messages import StoredMessage
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.trace import trace_of
from tests.support.processes import Stack

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=t61rcWkgMzE,other=00f067aa0ba902b7",
}
JOB = {"prompt": "hi", "max_tokens": 3}


async def stored_of(broker: Broker, job_id: str) -> dict[str, StoredMessage | None]:
    """The last message of each kind."""
    return {
        subject: await broker.subject_get(stream, subject)
        for stream, subject in (
            (subjects.STATES, subjects.state("tiny", job_id)),
            (subjects.EVENTS, subjects.state_events("tiny", job_id)),
            (subjects.EVENTS, subjects.token_events("tiny", job_id)),
            (subjects.RESULTS, subjects.result("tiny", job_id)),
        )
    }


async def assert_traced(url: str, job_id: str, trace: dict[str, str]) -> None:
    async with connected(BrokerSettings(url=url), "test") as broker:
        for subject, message in (await stored_of(broker, job_id)).items():
            assert message is not None, subject
            assert trace_of(message.headers) == trace, subject


@pytest.mark.parametrize("path", ["/jobs", "/v1/completions"])
async def test_a_trace_of_an_http_request_is_on_all_that_is_stored(
    shared_stack: Stack, path: str
) -> None:
    body = JOB if path == "/jobs" else {**JOB, "model": "tiny"}
    answer = shared_stack.http.post(path, json=body, headers={**TRACE, "prefer": "wait=60"})
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["id"].removeprefix("cmpl-")
    await assert_traced(shared_stack.nats.url, job_id, TRACE)


async def test_a_trace_of_a_nats_request_is_on_all_that_is_stored(shared_stack: Stack) -> None:
    client = await nats.connect(shared_stack.nats.url)
    body = json.dumps(JOB).encode()
    answer = await client.request("infer.complete", body, timeout=60, headers=TRACE)
    await client.close()
    await assert_traced(shared_stack.nats.url, json.loads(answer.data)["id"], TRACE)


async def test_a_request_that_waits_has_its_trace(tmp_path: Path) -> None:
    """And so has its result, when it is cancelled before an inferer has had it."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        job_id = stack.http.post("/jobs", json=JOB, headers=TRACE).json()["id"]
        async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
            subject = subjects.request("tiny", job_id)
            request = await broker.subject_get(subjects.REQUESTS, subject)
            assert request is not None
            assert trace_of(request.headers) == TRACE
            assert stack.http.delete(f"/jobs/{job_id}").status_code == 200
            result = await broker.subject_get(subjects.RESULTS, subjects.result("tiny", job_id))
            assert result is not None
            assert trace_of(result.headers) == TRACE


@pytest.mark.parametrize(
    "headers",
    [
        {"tracestate": "vendor=1"},  # says nothing without the other
        {"traceparent": ""},
        {"traceparent": "x" * 200},
        {"traceparent": "00-é"},
    ],
)
async def test_invalid_trace_headers_are_left_out(
    shared_stack: Stack, headers: dict[str, str]
) -> None:
    """The job runs all the same."""
    sent = {name.encode(): value.encode() for name, value in headers.items()}
    answer = shared_stack.http.post("/jobs", json=JOB, headers={**sent, b"prefer": b"wait=60"})
    assert answer.status_code == 200, answer.text
    await assert_traced(shared_stack.nats.url, answer.json()["id"], {})


async def test_a_dead_letter_and_a_second_attempt_have_the_trace(shared_stack: Stack) -> None:
    """What cannot be read as a request has headers all the same."""
    job_id = new_job_id()
    async with connected(BrokerSettings(url=shared_stack.nats.url), "test") as broker:
        await broker.publish_stored(subjects.request("tiny", job_id), b"nonsense", TRACE, 5)
        shared_stack.wait_for_end(job_id)
        letter = await broker.subject_get(subjects.DEAD, subjects.dead("tiny", job_id))
        assert letter is not None
        assert trace_of(letter.headers) == TRACE


async def test_an_owner_in_a_body_is_not_believed(shared_stack: Stack) -> None:
    """It is refused over HTTP and NATS, as is any unknown field; in a message on the queue it
    changes nothing."""
    answer = shared_stack.http.post("/jobs", json={**JOB, "owner": "ann"})
    assert answer.status_code == 400, answer.text
    job_id = new_job_id()
    body: dict[str, Any] = {"task": "complete", **JOB, "owner": "ann"}
    async with connected(BrokerSettings(url=shared_stack.nats.url), "test") as broker:
        await broker.publish_stored(
            subjects.request("tiny", job_id), json.dumps(body).encode(), {}, 5
        )
        shared_stack.wait_for_end(job_id)
        result = await broker.subject_get(subjects.RESULTS, subjects.result("tiny", job_id))
        assert result is not None
        assert json.loads(result.data).get("owner", "public") == "public"
