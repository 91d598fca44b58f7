"""`Idempotency-Key`: however often, wherever and whenever a request is sent, it is one job."""

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import httpx2
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.job_ids import new_job_id
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, Stack, eventually, server_sent_events

BODY = {"prompt": "once", "max_tokens": 3}
LONG = {"prompt": "go on", "max_tokens": 4000}

_numbers = itertools.count()


@pytest.fixture
def key() -> str:
    """One that no other test uses."""
    return f"key {next(_numbers)}"


@pytest.fixture(scope="module")
def pair(shared_stack: Stack) -> Iterator[tuple[httpx2.Client, httpx2.Client]]:
    """Clients of two gateways before the same queue."""
    shared_stack.start_gateway()
    _wait_until_ready(shared_stack.urls[1])
    with httpx2.Client(base_url=shared_stack.urls[1], timeout=PATIENCE_S) as second:
        yield shared_stack.http, second


@pytest.fixture
async def client(shared_stack: Stack) -> AsyncIterator[Client]:
    connection = await nats.connect(shared_stack.nats.url)
    yield connection
    await connection.close()


@pytest.fixture
def go_on(shared_stack: Stack) -> Iterator[Callable[[], None]]:
    """The inferer takes no job until this is called."""
    _set_concurrency(shared_stack.http, 0)
    yield lambda: _set_concurrency(shared_stack.http, 1)
    _set_concurrency(shared_stack.http, 1)


def test_a_request_sent_again_is_the_same_job(
    shared_stack: Stack, pair: tuple[httpx2.Client, httpx2.Client], key: str
) -> None:
    """On another gateway, in other white space and order, while it waits and after its end."""
    content = ('{"prompt":"once","max_tokens":3}', '{ "max_tokens": 3,\n "prompt": "once" }')
    answers = [
        gateway.post("/jobs", content=body, headers={"idempotency-key": key})
        for gateway, body in zip(pair, content, strict=True)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    (job_id,) = {answer.json()["id"] for answer in answers}
    assert {answer.headers["location"] for answer in answers} == {f"/status/{job_id}"}

    ended = shared_stack.wait_for_end(job_id)
    late = _post(pair[1], key, BODY)
    assert (late.status_code, late.json()["id"]) == (202, job_id)
    assert late.json()["state"] == "SUCCESS"
    waited = pair[0].post("/jobs", json=BODY, headers=_headers(key, prefer="wait=30"))
    assert (waited.status_code, waited.json()) == (200, ended)


def test_every_option_is_compared(pair: tuple[httpx2.Client, httpx2.Client], key: str) -> None:
    """In whatever order they are, and whatever their types."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    options: dict[str, Any] = {
        "stop": ["x", "y"],
        "logit_bias": {"5": 1, "70": -2.5},
        "stop_token_ids": [5, 6],
        "min_tokens": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "metadata": {"a": {"b": [1, None]}, "c": 2},
        "priority": "low",
    }
    for number, body in enumerate([{**BODY, **options}, {**BODY, "response_format": schema}]):
        other_order = {name: body[name] for name in reversed(body)}
        if "logit_bias" in body:
            other_order["logit_bias"] = {"70": -2.5, "5": 1}
        ids = [
            _post(gateway, f"{key} {number}", asked).json()["id"]
            for gateway, asked in zip(pair, (body, other_order), strict=True)
        ]
        assert len({*ids}) == 1
    changes: list[dict[str, Any]] = [
        {"logit_bias": {"5": 1}},
        {"min_tokens": 2},
        {"metadata": {}},
    ]
    for changed in changes:
        assert _post(pair[1], f"{key} 0", {**BODY, **options, **changed}).status_code == 422


def test_another_request_with_the_key_is_refused(
    pair: tuple[httpx2.Client, httpx2.Client], key: str
) -> None:
    """422 in the shape of each route; another key, or none, is another job."""
    job_id = _post(pair[0], key, BODY).json()["id"]
    refused = _post(pair[1], key, {**BODY, "max_tokens": 4})
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert (refused.json()["status"], refused.json()["code"]) == (422, "idempotency_key_reused")
    refused = pair[0].post("/v1/completions", json=LONG, headers=_headers(key))
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "idempotency_key_reused")

    assert _post(pair[0], key + "'", BODY).json()["id"] != job_id
    assert pair[0].post("/jobs", json=BODY).json()["id"] != job_id


@pytest.mark.parametrize("value", [b"", b"x" * 256, "schlüssel".encode(), b"a\tb"], ids=len)
def test_an_invalid_key_is_refused(shared_stack: Stack, value: bytes) -> None:
    """With a sentence that says what a key is."""
    answer = shared_stack.http.post("/jobs", json=BODY, headers={b"idempotency-key": value})
    assert answer.status_code == 400
    assert "1 to 255 printable ASCII characters" in answer.json()["detail"]


def test_the_longest_key_is_accepted(shared_stack: Stack) -> None:
    """All 255 characters of it count."""
    keys = ("x" * 255, "x" * 254 + "y", "x" * 255)
    ids = [_post(shared_stack.http, key, BODY).json()["id"] for key in keys]
    assert ids[0] == ids[2] != ids[1]


def test_many_at_once_are_one_job(
    shared_stack: Stack, pair: tuple[httpx2.Client, httpx2.Client], key: str
) -> None:
    """Twenty submits at the same moment, through two gateways: one id, one run."""
    ready = threading.Barrier(20)

    def submit(number: int) -> httpx2.Response:
        ready.wait()
        return _post(pair[number % 2], key, BODY)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(submit, range(20)))
    assert {answer.status_code for answer in answers} == {202}, [a.text for a in answers]
    (job_id,) = {answer.json()["id"] for answer in answers}
    assert shared_stack.wait_for_end(job_id)["attempts"] == 1
    shared_stack.wait_for_end(shared_stack.submit(**BODY))  # what came after it has been served
    accepted = [e for g in shared_stack.gateways for e in g.events("request_accepted")]
    assert [event["job_id"] for event in accepted].count(job_id) == 1
    finished = shared_stack.inferers[0].events("job_finished")
    assert [event["job_id"] for event in finished].count(job_id) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_openai_answers_are_those_of_the_first_job(
    pair: tuple[httpx2.Client, httpx2.Client], key: str, stream: bool
) -> None:
    """The same id and text, whole or as a stream, while it runs and afterwards."""
    body = {"prompt": "tell me", "max_tokens": 300}
    headers = _headers(key)

    def ask(gateway: httpx2.Client, streamed: bool) -> tuple[str, str]:
        request = {**body, "stream": streamed}
        answer = gateway.post("/v1/completions", json=request, headers=headers)
        assert answer.status_code == 200, answer.text
        if not streamed:
            return answer.json()["id"], answer.json()["choices"][0]["text"]
        data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert data[-1] == "[DONE]"
        chunks = [json.loads(line) for line in data[:-1] if line.startswith("{")]
        (answer_id,) = {chunk["id"] for chunk in chunks}
        return answer_id, "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, pair, (False, stream)))
    assert together[0] == together[1] == ask(pair[1], stream)


def test_a_hang_up_cancels_nothing(
    shared_stack: Stack,
    pair: tuple[httpx2.Client, httpx2.Client],
    go_on: Callable[[], None],
    key: str,
) -> None:
    """Who has a key may come back with it: neither the first nor a later one ends the job."""
    ids = set()
    for gateway in pair:
        with pytest.raises(httpx2.ReadTimeout):
            gateway.post("/jobs", json=BODY, headers=_headers(key, prefer="wait=60"), timeout=0.5)
        ids.add(_post(gateway, key, BODY).json()["id"])
    stream = {**BODY, "stream": True}
    with pytest.raises(httpx2.ReadTimeout):
        pair[0].post("/v1/completions", json=stream, headers=_headers(key), timeout=0.5)
    (job_id,) = ids
    assert shared_stack.status(job_id)["state"] == "PENDING"
    go_on()
    assert shared_stack.wait_for_end(job_id)["state"] == "SUCCESS"


def test_a_refused_request_leaves_no_key(
    shared_stack: Stack, go_on: Callable[[], None], key: str
) -> None:
    """After 400, 404, 413 and 429 the same key is free, also for another request."""
    for body, status in (
        ({"prompt": "x", "max_tokens": 5000}, 400),
        ({"prompt": "x", "model": "nope"}, 404),
        ({"prompt": "x" * 5_000_000}, 413),
    ):
        assert _post(shared_stack.http, key, body).status_code == status
    small = _start_gateway(shared_stack, GATEWAY_MAX_WAITING="1")
    with small:
        waiting = small.post("/jobs", json=BODY).json()["id"]
        assert _post(small, key, BODY).status_code == 429
        assert _post(small, key, BODY).status_code == 429
        shared_stack.http.delete(f"/jobs/{waiting}")
        accepted = eventually(lambda: _accepted(_post(small, key, LONG)), "there is room")
        # One that is known is found, whether or not there is room for another.
        assert _post(small, key, LONG).json()["id"] == accepted["id"]
        shared_stack.http.delete(f"/jobs/{accepted['id']}")
    shared_stack.end_gateway()


async def test_a_key_is_the_same_over_nats(
    shared_stack: Stack, client: Client, go_on: Callable[[], None], key: str
) -> None:
    """A header of the same name, and the same keys: each caller of a job gets its result."""
    job_id = (await asyncio.to_thread(_post, shared_stack.http, key, BODY)).json()["id"]
    for _ in range(2):
        answer = await _request(client, "infer.submit", BODY, key)
        assert json.loads(answer.data)["id"] == job_id
    for endpoint, body in (("submit", LONG), ("complete", LONG)):
        refused = (await _request(client, f"infer.{endpoint}", body, key)).headers or {}
        assert refused["Nats-Service-Error-Code"] == "422"
    refused = (await _request(client, "infer.submit", BODY, "x" * 256)).headers or {}
    assert refused["Nats-Service-Error-Code"] == "400"

    asking = [asyncio.create_task(_request(client, "infer.complete", BODY, key)) for _ in range(2)]
    await asyncio.to_thread(go_on)
    results = [json.loads((await one).data) for one in asking]
    late = json.loads((await _request(client, "infer.complete", BODY, key)).data)
    assert results == [late, late]
    assert (late["id"], late["outcome"]) == (job_id, "completed")


async def test_a_repeated_stream_over_nats_is_the_same(client: Client, key: str) -> None:
    """The second caller gets every token from the first on, the result and the empty end."""
    body = {"prompt": "tell me", "max_tokens": 300, "stream": True}
    first = asyncio.create_task(_stream(client, body, key))
    answers = [await _stream(client, body, key), await first, await _stream(client, body, key)]
    for *frames, result, end in answers:
        assert end.data == b""
        assert result.data == answers[0][-2].data
        texts = [text for frame in frames for text in json.loads(frame.data)["tokens"]]
        assert "".join(texts) == json.loads(result.data)["text"]


async def test_a_stream_repeated_after_its_frames_are_gone_has_the_whole_text(
    client: Client, key: str
) -> None:
    """Frames may be lost, or stored after the result: what they do not hold comes from the result,
    so the frames still add up to its text."""
    body = {"prompt": "tell me", "max_tokens": 20, "stream": True}
    *_, result, _ = await _stream(client, body, key)
    subject = f"infer.events.{json.loads(result.data)['id']}.tokens"
    await client.jetstream().purge_stream("EVENTS", subject=subject)
    *frames, repeated, end = await _stream(client, body, key)
    assert (repeated.data, end.data) == (result.data, b"")
    texts = [text for frame in frames for text in json.loads(frame.data)["tokens"]]
    assert "".join(texts) == json.loads(result.data)["text"]


async def test_an_entry_without_its_job_gets_its_job(
    shared_stack: Stack, client: Client, go_on: Callable[[], None], key: str
) -> None:
    """A gateway that died between the entry and the job: who comes next publishes that job."""
    bucket = await client.jetstream().key_value("IDEMPOTENCY")
    job = await asyncio.to_thread(_post, shared_stack.http, key, BODY)
    entry = json.loads((await bucket.get(_hash(key))).value or b"")
    assert entry["id"] == job.json()["id"]

    job_id, dead_ones = new_job_id(), f"{key} of a gateway that died"
    await bucket.create(_hash(dead_ones), json.dumps({**entry, "id": job_id}).encode())
    assert shared_stack.http.get(f"/status/{job_id}").status_code == 404
    other = await asyncio.to_thread(_post, shared_stack.http, dead_ones, LONG)
    assert other.status_code == 422
    for _ in range(2):
        again = await asyncio.to_thread(_post, shared_stack.http, dead_ones, BODY)
        assert (again.status_code, again.json()["id"]) == (202, job_id)
    go_on()
    assert shared_stack.wait_for_end(job_id)["state"] == "SUCCESS"


async def test_a_job_published_again_after_its_end_does_not_run_again(
    shared_stack: Stack, client: Client
) -> None:
    """By a gateway that was frozen for longer than the broker remembers ids: the inferer sees the
    result and stops, and nothing that anybody can see of the job changes."""
    job_id = shared_stack.submit(**BODY)
    ended = shared_stack.wait_for_end(job_id)
    shared_stack.wait_for_end(shared_stack.submit(**BODY))
    announced = await client.subscribe("infer.finished.*.*")
    subject = f"infer.requests.tiny.normal.public.{job_id}"
    await client.jetstream().publish(subject, json.dumps(LONG).encode())
    inferer = shared_stack.inferers[0]

    def settled() -> bool:
        finished = inferer.events("job_finished")
        return [event["job_id"] for event in finished].count(job_id) == 2

    eventually(settled, "it is off the queue again")
    assert shared_stack.status(job_id) == ended
    await flush(client)
    assert announced.pending_msgs == 0


async def test_a_key_that_has_expired_is_free(
    shared_stack: Stack, client: Client, key: str
) -> None:
    """At once, although the broker keeps a marker in its place for a moment."""
    entry = json.dumps({"id": new_job_id(), "digest": "another"}).encode()
    subject = f"$KV.IDEMPOTENCY.{_hash(key)}"
    await client.jetstream().publish(subject, entry, headers={"Nats-TTL": "1s"})
    assert _post(shared_stack.http, key, BODY).status_code == 422

    def free() -> httpx2.Response | None:
        answer = _post(shared_stack.http, key, BODY)
        return None if answer.status_code == 422 else answer

    answer = eventually(free, "the entry has expired")
    assert answer.status_code == 202, answer.text
    assert _post(shared_stack.http, key, BODY).json()["id"] == answer.json()["id"]


def test_keys_outlive_gateway_and_broker(stack: Stack) -> None:
    """kill -9 of both, one after the other, while the job waits and after it has finished."""
    _set_concurrency(stack.http, 0)
    job_id = _post(stack.http, "k", BODY).json()["id"]
    stack.gateways[0].kill()
    with _start_gateway(stack) as second:
        assert _post(second, "k", BODY).json()["id"] == job_id
        stack.nats.process.kill()
        eventually(lambda: not _is_ready(stack.urls[1]), "the gateway has noticed")
        assert _post(second, "k", BODY).status_code == 503
        stack.nats.start()
        _wait_until_ready(stack.urls[1])
        assert _post(second, "k", BODY).json()["id"] == job_id
        assert _post(second, "k", LONG).status_code == 422
        _set_concurrency(second, 1)
        done = second.post("/jobs", json=BODY, headers=_headers("k", prefer="wait=60"))
        assert (done.status_code, done.json()["id"]) == (200, job_id)
        # Its message is gone, and the broker forgets the ids of such when it starts again.
        stack.nats.process.kill()
        eventually(lambda: not _is_ready(stack.urls[1]), "the gateway has noticed")
        stack.nats.start()
        _wait_until_ready(stack.urls[1])
        again = _post(second, "k", BODY).json()
        assert (again["id"], again["state"]) == (job_id, "SUCCESS")
        assert second.get("/queue").json()["models"][0]["waiting"] == 0


def test_a_stream_repeated_in_its_middle_begins_with_what_there_is(stack: Stack) -> None:
    """Also while nothing new comes: its inferer is frozen."""

    def text_of(event: dict[str, str]) -> str:
        text: str = json.loads(event["data"])["choices"][0]["text"]
        return text

    request: dict[str, Any] = {"json": {**LONG, "stream": True}, "headers": _headers("k")}
    with stack.http.stream("POST", "/v1/completions", **request) as first:
        texts = map(text_of, server_sent_events(first))
        sent = "".join(itertools.islice(filter(None, texts), 3))
        stack.inferers[0].freeze()
        with stack.http.stream("POST", "/v1/completions", **request) as second:
            again = next(filter(None, map(text_of, server_sent_events(second))))
    stack.inferers[0].thaw()
    assert sent.startswith(again) or again.startswith(sent)


def _set_concurrency(gateway: httpx2.Client, slots: int) -> None:
    answer = gateway.put("/concurrency", json={"concurrency": slots})
    assert answer.status_code == 200, answer.text


def _post(gateway: httpx2.Client, key: str, body: dict[str, Any]) -> httpx2.Response:
    return gateway.post("/jobs", json=body, headers=_headers(key))


def _headers(key: str, **others: str) -> dict[str, str]:
    return {"idempotency-key": key, **others}


def _accepted(answer: httpx2.Response) -> dict[str, Any] | None:
    found: dict[str, Any] = answer.json()
    return found if answer.status_code == 202 else None


def _hash(key: str) -> str:
    """The key's name in the bucket: the owner comes first."""
    return sha256(f"public\0{key}".encode()).hexdigest()


def _start_gateway(stack: Stack, **environment: str) -> httpx2.Client:
    """Another gateway; a client of it."""
    stack.start_gateway(**environment)
    _wait_until_ready(stack.urls[-1])
    return httpx2.Client(base_url=stack.urls[-1], timeout=PATIENCE_S)


def _wait_until_ready(url: str) -> None:
    eventually(lambda: _is_ready(url), "the gateway is ready")


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


async def _request(client: Client, subject: str, body: dict[str, Any], key: str) -> Msg:
    headers = {"Idempotency-Key": key}
    return await client.request(
        subject, json.dumps(body).encode(), timeout=PATIENCE_S, headers=headers
    )


async def _stream(client: Client, body: dict[str, Any], key: str) -> list[Msg]:
    """All messages of a streamed answer, up to the empty one."""
    answers = await client.subscribe(client.new_inbox())
    await client.publish(
        "infer.complete",
        json.dumps(body).encode(),
        reply=answers.subject,
        headers={"Idempotency-Key": key},
    )
    messages = [await answers.next_msg(timeout=PATIENCE_S)]
    while messages[-1].data:
        messages.append(await answers.next_msg(timeout=PATIENCE_S))
    await answers.unsubscribe()
    assert len(messages) > 1, messages[0].headers
    return messages
