"""Clients that reach their timeout, as the official client does with its default retries, find
their job again; others that disconnect cancel it."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx2
import nats
import openai
import pytest

from shared.wire import subjects
from tests.support.processes import PATIENCE_S, Stack, eventually

TIMEOUT_S = 2.0
RETURN_S = "8"
"""Of the third gateway: long enough to kill it meanwhile, short enough to wait for."""


@pytest.fixture(scope="module")
def stack(shared_stack: Stack) -> Stack:
    """Two gateways that keep jobs for the default time."""
    shared_stack.start_gateway()
    eventually(lambda: _is_ready(shared_stack.urls[1]), "the second gateway is ready")
    return shared_stack


@pytest.fixture
def go_on(stack: Stack) -> Iterator[Callable[[], None]]:
    """The inferer takes no job until this is called."""
    _set_concurrency(stack, 0)
    yield lambda: _set_concurrency(stack, 1)
    _set_concurrency(stack, 1)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as threads:
        yield threads


def test_a_client_that_times_out_gets_the_answer_of_its_job(
    stack: Stack, go_on: Callable[[], None], pool: ThreadPoolExecutor
) -> None:
    """It has waited longer than its timeout: one job is accepted, one runs, and it is answered."""
    seen = _Seen(stack)
    answering = _ask(pool, stack.url, _chat("one client"))
    eventually(lambda: seen.count("job_adopted") == 1, "its retry has found the job")
    go_on()
    answer = answering.result(PATIENCE_S)
    assert answer.choices[0].message.content
    (job,) = seen.events("request_accepted")
    assert answer.id.endswith(job["job_id"])
    assert {event["job_id"] for event in seen.events("job_adopted")} == {job["job_id"]}
    assert stack.http.get(f"/status/{job['job_id']}").json()["attempts"] == 1
    _assert_no_orphans(stack)


@pytest.mark.parametrize("same", [True, False], ids=["equal requests", "different requests"])
def test_ten_clients_at_once_have_ten_jobs(
    stack: Stack, go_on: Callable[[], None], pool: ThreadPoolExecutor, same: bool
) -> None:
    """Also if their requests are equal: a job has one client at a time. First attempts come to one
    gateway, retries to the other."""
    seen = _Seen(stack)
    bodies = [_chat("ten clients" if same else f"client {number}") for number in range(10)]
    answering = [_ask(pool, stack.url, body, stack.urls[1]) for body in bodies]
    eventually(lambda: seen.count("job_adopted") >= 10, "each has found a job")
    go_on()
    answers = [one.result(PATIENCE_S) for one in answering]
    accepted = {event["job_id"] for event in seen.events("request_accepted")}
    assert len(accepted) == 10
    answered = {job for job in accepted for answer in answers if answer.id.endswith(job)}
    assert answered == accepted

    def finished() -> list[str]:
        events = stack.inferers[0].events("job_finished")
        return [event["job_id"] for event in events if event["job_id"] in accepted]

    # A job is answered a moment before it is logged.
    eventually(lambda: accepted <= set(finished()), "each has run")
    assert len(finished()) == 10
    _assert_no_orphans(stack)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_another_request_does_not_find_it(
    stack: Stack, go_on: Callable[[], None], path: str
) -> None:
    """Neither a first attempt nor a retry of another body; the same body in other words does."""
    seen = _Seen(stack)
    body = _chat(path) if "chat" in path else {"model": "tiny", "prompt": path, "max_tokens": 2}
    _leave(stack, path, body)
    eventually(lambda: seen.count("job_orphaned") == 1, "its place is kept")
    _leave(stack, path, body, retry=0)
    _leave(stack, path, {**body, "max_tokens": 3}, retry=1)
    eventually(lambda: seen.count("job_orphaned") == 3, "these are jobs of their own")
    assert seen.count("job_adopted") == 0
    go_on()
    reordered = {name: body[name] for name in reversed(body)}
    answer = stack.http.post(path, json=reordered, headers=_headers(1))
    assert answer.status_code == 200, answer.text
    first = seen.events("request_accepted")[0]["job_id"]
    assert answer.json()["id"].endswith(first)


def test_an_answer_that_came_meanwhile_is_given(stack: Stack, go_on: Callable[[], None]) -> None:
    """Between two attempts the job may end: the next one gets its result, without another run."""
    seen = _Seen(stack)
    _leave(stack, "/v1/chat/completions", _chat("meanwhile"))
    eventually(lambda: seen.count("job_orphaned") == 1, "its place is kept")
    go_on()
    (job,) = seen.events("request_accepted")
    stack.wait_for_end(job["job_id"])
    answer = httpx2.post(
        f"{stack.urls[1]}/v1/chat/completions",
        json=_chat("meanwhile"),
        headers=_headers(2),
        timeout=PATIENCE_S,
    )
    assert answer.json()["id"].endswith(job["job_id"])
    assert seen.count("request_accepted") == 1


def test_a_hang_up_before_the_timeout_cancels_at_once(
    stack: Stack, go_on: Callable[[], None]
) -> None:
    """So does one whose client did not say what its timeout is, or whose header is not a time."""
    for timeout in ("60", "", "soon", "-1", "0", "nan", "inf"):
        seen = _Seen(stack)
        headers = {"x-stainless-read-timeout": timeout} if timeout else {}
        _leave(stack, "/v1/chat/completions", _chat("hang up"), headers=headers)
        eventually(partial(_has_abandoned_one, seen), f"it is, with a timeout of {timeout!r}")
        assert seen.count("job_orphaned") == 0
        (job,) = seen.events("request_accepted")
        status = stack.http.get(f"/status/{job['job_id']}").json()
        assert status["error"]["code"] == "client_disconnected"


def test_several_prompts_are_kept_together(stack: Stack, go_on: Callable[[], None]) -> None:
    """Each prompt is a job with a place of its own, also where two are equal; a hang-up before the
    timeout cancels all."""
    body = {"model": "tiny", "prompt": ["one", "two", "one"], "max_tokens": 2}
    seen = _Seen(stack)
    _leave(stack, "/v1/completions", body, jobs=3, headers={"x-stainless-read-timeout": "60"})
    eventually(lambda: seen.count("job_abandoned") == 3, "they are cancelled")

    seen = _Seen(stack)
    _leave(stack, "/v1/completions", body, jobs=3)
    eventually(lambda: seen.count("job_orphaned") == 3, "their places are kept")
    go_on()
    answer = httpx2.post(
        f"{stack.urls[1]}/v1/completions", json=body, headers=_headers(1), timeout=PATIENCE_S
    )
    assert answer.status_code == 200, answer.text
    # The lines are written a moment after the answer.
    eventually(lambda: seen.count("job_adopted") == 3, "each has found its job")
    assert seen.count("request_accepted") == 3
    assert {one["job_id"] for one in seen.events("job_adopted")} == {
        one["job_id"] for one in seen.events("request_accepted")
    }
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]


@pytest.mark.parametrize("dies", [False, True], ids=["the same gateway", "another gateway"])
def test_a_job_whose_client_stays_away_is_cancelled(
    stack: Stack, go_on: Callable[[], None], dies: bool
) -> None:
    """After GATEWAY_RETURN_S, by any gateway."""
    brief = stack.start_gateway(GATEWAY_RETURN_S=RETURN_S)
    url = stack.urls[-1]
    try:
        eventually(lambda: _is_ready(url), "the gateway is ready")
        seen = _Seen(stack)
        _leave(stack, "/v1/chat/completions", _chat("away"), url=url)
        (orphan,) = eventually(lambda: seen.events("job_orphaned") or None, "its place is kept")
    finally:
        if dies:
            brief.kill()
            stack.end_gateway()
    status = f"/status/{orphan['job_id']}"
    eventually(lambda: stack.http.get(status).json()["state"] == "REVOKED", "it is cancelled")
    assert stack.http.get(status).json()["error"]["code"] == "client_disconnected"
    _assert_no_orphans(stack)
    eventually(lambda: seen.count("job_abandoned") == 1, "one gateway has cancelled it")
    if not dies:
        stack.end_gateway()


@pytest.mark.parametrize("timeout_s", [1.0, TIMEOUT_S])
def test_a_stream_does_not_reach_the_timeout(
    stack: Stack, go_on: Callable[[], None], pool: ThreadPoolExecutor, timeout_s: float
) -> None:
    """However long it waits: it opens before, and then a comment comes in time."""
    seen = _Seen(stack)
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=timeout_s)

    def read() -> list[Any]:
        with client:
            return list(client.chat.completions.create(**_chat("stream"), stream=True))

    reading = pool.submit(read)
    eventually(lambda: seen.count("request_accepted") == 1, "its job waits")
    time.sleep(2.5 * timeout_s)  # longer than the timeout
    go_on()
    chunks = reading.result(PATIENCE_S)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert seen.count("request_accepted") == 1
    assert seen.count("job_adopted") == seen.count("job_abandoned") == 0


def _has_abandoned_one(seen: "_Seen") -> bool:
    return seen.count("job_abandoned") == 1


class _Seen:
    """What the gateways log from now on."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._before: dict[tuple[int, str], int] = {}
        for gateway in stack.gateways:
            for name in ("request_accepted", "job_adopted", "job_orphaned", "job_abandoned"):
                self._before[gateway.pid, name] = len(gateway.events(name))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [
            event
            for gateway in self._stack.gateways
            for event in gateway.events(name)[self._before.get((gateway.pid, name), 0) :]
        ]

    def count(self, name: str) -> int:
        return len(self.events(name))


def _chat(text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 2}


def _ask(
    pool: ThreadPoolExecutor, url: str, body: dict[str, Any], retry_url: str | None = None
) -> Future[Any]:
    """With the official client, whose retries may go to another gateway."""

    def to_other_gateway(request: Any) -> None:
        if retry_url is not None and request.headers["x-stainless-retry-count"] != "0":
            request.url = request.url.copy_with(port=httpx2.URL(retry_url).port)

    def ask() -> Any:
        hooks = {"request": [to_other_gateway]}
        http_client = openai.DefaultHttpxClient(event_hooks=hooks)
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, http_client=http_client
        ) as client:
            return client.chat.completions.create(**body)

    return pool.submit(ask)


def _headers(retry: int) -> dict[str, str]:
    return {"x-stainless-read-timeout": "0.5", "x-stainless-retry-count": str(retry)}


def _leave(
    stack: Stack,
    path: str,
    body: dict[str, Any],
    retry: int = 0,
    headers: dict[str, str] | None = None,
    url: str | None = None,
    jobs: int = 1,
) -> None:
    """Send a request, and disconnect once its ``jobs`` are accepted, which is at its timeout for a
    client whose ``headers`` name so short a time."""
    url = url or stack.url
    accepted = _Seen(stack)
    payload = json.dumps(body).encode()
    address = httpx2.URL(url)
    lines = {"Host": address.netloc.decode(), "Content-Length": len(payload)}
    lines |= _headers(retry) if headers is None else headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + payload)
        eventually(lambda: accepted.count("request_accepted") == jobs, "the job is accepted")


def _assert_no_orphans(stack: Stack) -> None:
    async def read() -> dict[str, int]:
        connection = await nats.connect(stack.nats.url)
        info = await connection.jetstream().stream_info(
            f"KV_{subjects.IDEMPOTENCY}", subjects_filter=subjects.ORPHANS_WILDCARD
        )
        await connection.close()
        return info.state.subjects or {}

    eventually(lambda: not asyncio.run(read()), "no entry of an orphan is left")


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def _set_concurrency(stack: Stack, slots: int) -> None:
    stack.http.put("/concurrency", json={"concurrency": slots}).raise_for_status()
