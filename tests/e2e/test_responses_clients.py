"""Responses of clients that hang up, time out or repeat themselves, and without kept requests."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.support.processes import PATIENCE_S, Stack, eventually

LONG = 1000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A gateway that keeps no requests."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.start_gateway(GATEWAY_KEEP_REQUESTS_H="0")
        running.start_inferer(tiny_model)
        running.wait_until_served("tiny")
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as opened:
        yield opened


def accepted(stack: Stack) -> set[str]:
    return {event["job_id"] for event in stack.gateways[0].events("request_accepted")}


@pytest.mark.parametrize("stream", [False, True])
def test_the_job_of_a_client_that_hangs_up_is_cancelled(stack: Stack, stream: bool) -> None:
    """Unless it is in the background, or has a key."""
    for options, header, state in (
        ({}, "", "REVOKED"),
        ({"background": True}, "", "SUCCESS"),
        ({}, f"Idempotency-Key: hang up {stream}\r\n", "SUCCESS"),
    ):
        before = accepted(stack)
        length = LONG if state == "REVOKED" else 50
        body = {"model": "tiny", "input": "hi", "max_output_tokens": length, "stream": stream}
        _hang_up(stack, json.dumps(body | options), header, before)
        (job_id,) = accepted(stack) - before
        ended = stack.wait_for_state(job_id, "SUCCESS", "REVOKED", "FAILURE")
        assert ended["state"] == state


def _hang_up(stack: Stack, body: str, header: str, before: set[str]) -> None:
    url = httpx2.URL(stack.url)
    with socket.create_connection((url.host, url.port or 80)) as connection:
        head = f"POST /v1/responses HTTP/1.1\r\nhost: {url.host}:{url.port}\r\n{header}"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        eventually(lambda: bool(accepted(stack) - before), "the job is accepted")


def test_a_client_that_times_out_finds_its_response_again(stack: Stack) -> None:
    """The official client with its default retries: one job, which is answered."""
    stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    before = accepted(stack)

    with (
        ThreadPoolExecutor() as pool,
        openai.OpenAI(base_url=f"{stack.url}/v1", api_key="x", timeout=2.0) as client,
    ):
        answering = pool.submit(
            client.responses.create, model="tiny", input="late", max_output_tokens=3
        )
        eventually(lambda: bool(stack.gateways[0].events("job_adopted")), "its retry has the job")
        stack.http.put("/concurrency", json={"concurrency": 1}).raise_for_status()
        response = answering.result(PATIENCE_S)
    (job_id,) = accepted(stack) - before
    assert response.id == f"resp_{job_id}"
    assert response.output_text


def test_the_same_key_is_the_same_response(client: openai.OpenAI) -> None:
    """In the background, too, where it is shown as it is by then; with another body it is 422."""
    request: Any = {"model": "tiny", "input": "hi", "max_output_tokens": 3, "background": True}
    key: Any = {"extra_headers": {"Idempotency-Key": "responses"}}
    first = client.responses.create(**request, **key)
    eventually(
        lambda: client.responses.retrieve(first.id).status == "incomplete", "the response ends"
    )
    again = client.responses.create(**request, **key)
    assert (again.id, again.status) == (first.id, "incomplete")
    *_, last = client.responses.create(**request, **key, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.id == first.id
    with pytest.raises(openai.UnprocessableEntityError):
        client.responses.create(**{**request, "input": "ho"}, **key)


def test_without_kept_requests(client: openai.OpenAI) -> None:
    """A response is read with what its result says. What needs the request is refused, and says
    why; items of its output can still be referred to."""
    response = client.responses.create(
        model="tiny",
        input="hi",
        instructions="Be brief.",
        max_output_tokens=3,
        metadata={"a": "b"},
        user="u77",
    )
    read = client.responses.retrieve(response.id)
    assert read.output == response.output
    assert (read.status, read.user, read.metadata) == ("incomplete", "u77", {"a": "b"})
    assert (read.instructions, read.max_output_tokens) == (None, None)
    for param, request in (
        ("previous_response_id", ("POST", "/responses", {"previous_response_id": response.id})),
        ("response_id", ("GET", f"/responses/{response.id}/input_items", {})),
    ):
        method, path, body = request
        answer = httpx2.request(
            method, f"{client.base_url}{path[1:]}", json={"input": "more", **body}
        )
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert "GATEWAY_KEEP_REQUESTS_H" in error["message"]
    referred: Any = [
        {"role": "user", "content": "hi"},
        {"type": "item_reference", "id": response.output[0].id},
        {"role": "user", "content": "more"},
    ]
    assert client.responses.create(model="tiny", input=referred, max_output_tokens=1).output_text
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_stream_that_waits_longer_than_the_clients_timeout(stack: Stack) -> None:
    """It opens in time, and comments keep it open."""
    stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    timeout_s = 1.0
    with openai.OpenAI(
        base_url=f"{stack.url}/v1", api_key="x", timeout=timeout_s, max_retries=0
    ) as client:
        stream = client.responses.create(
            model="tiny", input="hi", max_output_tokens=20, stream=True
        )
        first = next(stream)
        assert first.type == "response.created"
        opener = threading.Timer(
            3 * timeout_s, lambda: stack.http.put("/concurrency", json={"concurrency": 1})
        )
        opener.start()
        *_, last = stream
        opener.join()
    assert last.type == "response.incomplete"
    assert last.response.id == first.response.id
