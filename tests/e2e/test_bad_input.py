"""What cannot run is refused with a sentence, and nothing of it stays behind."""

import gzip
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.processes import Stack, eventually, server_sent_events
from tests.support.schemas import TOO_MUCH

JOBS, CHAT, COMPLETIONS = ROUTES = ("/jobs", "/v1/chat/completions", "/v1/completions")
MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'
PROMPT = '"prompt": "hi"'
GOOD = {JOBS: PROMPT, CHAT: MESSAGES, COMPLETIONS: PROMPT}

LIMIT = 4 * 1024 * 1024
"""GATEWAY_MAX_BODY_BYTES where nobody sets it."""

NOT_A_REQUEST = {
    "empty": b"",
    "blank": b" \n",
    "not JSON": b"max_tokens=5",
    "cut off": b'{"prompt": "hi", "messages',
    "an array": b"[]",
    "null": b"null",
    "a string": b'"hi"',
    "a number": b"5",
    "two objects": b"{}{}",
    "an empty object": b"{}",
    "neither prompt nor messages": b'{"max_tokens": 5}',
    "not UTF-8": b'{"prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    "UTF-16": '{"prompt": "hi"}'.encode("utf-16"),
}

NOT_AN_OPTION = [
    *('"metadata": {"name": "\udcff"}', '"metadata": {"name": "\\ud800"}', '"metadata": 5'),
    *('"max_tokens": "5"', '"max_tokens": 5.5', '"max_tokens": true', '"max_tokens": [5]'),
    *('"max_tokens": 0', '"max_tokens": -1', f'"max_tokens": {10**30}'),
    *('"temperature": -0.1', '"temperature": 2.1', '"temperature": NaN', '"temperature": 1e999'),
    *('"temperature": "1"', '"temperature": true', '"temperature": Infinity'),
    *('"top_p": -0.1', '"top_p": 1.1', '"top_p": NaN', '"top_p": "1"'),
    *('"seed": "7"', '"seed": 7.5', '"seed": true', f'"seed": {10**30}'),
    *('"stop": 5', '"stop": [5]', '"stop": ""', '"stop": [""]', '"stop": {"a": 1}'),
    *('"model": 5', '"model": ["tiny"]'),
    '"metadata": {"deep": ' + 5_000 * "[" + 5_000 * "]" + "}",
    *('"response_format": "json"', '"response_format": {"type": "yaml"}'),
    '"response_format": {"type": "json_schema"}',
    '"response_format": {"type": "text", "typ": 1}',
    *('"max_token": 5', '"response_format": {"type": "grammar"}'),
    '"response_format": {"type": "grammar", "grammar": "root = x"}',
    '"response_format": {"type": "regex", "pattern": "("}',
    *(
        f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'
        for schema in ('{"type": "nonsense"}', '{"properties": 5}', "5", '{"pattern": "("}')
    ),
]

NOT_FOR_JOBS = ['"timeout_s": 0', '"timeout_s": -1', '"timeout_s": "x"', '"timeout_s": 1e999']
NOT_FOR_JOBS += ['"max_tokens": 4097', '"timeout_s": 100000', MESSAGES]

NOT_MESSAGES = [
    *("[]", "{}", '"hi"', "null", "5", "[5]", "[null]"),
    *('[{"role": "user"}]', '[{"role": "user", "content": null}]', '[{"content": "hi"}]'),
    *('[{"role": "robot", "content": "hi"}]', '[{"role": 5, "content": "hi"}]'),
    *('[{"role": "user", "content": 5}]', '[{"role": "user", "content": [{"type": "text"}]}]'),
    '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]',
    '[{"role": "user", "content": [{"text": "hi"}]}]',
    '[{"role": "user", "content": "hi", "nam": "x"}]',
    '[{"role": "user", "content": "\\ud800"}]',
]
NOT_A_PROMPT = ['""', "null", "5", "{}", "[]", '[""]', '[5, "a"]', "[[]]", '"\\ud800"']
NOT_A_PROMPT += ["[-1]", '[["a"]]', "[99999999]", str(["a"] * 65).replace("'", '"')]


def _bad_bodies() -> Iterator[Any]:
    for route, (name, body) in itertools.product(ROUTES, NOT_A_REQUEST.items()):
        yield pytest.param(route, body, id=f"{route} {name}")
    options = [(route, option) for route in ROUTES for option in NOT_AN_OPTION]
    for route, option in options + [(JOBS, option) for option in NOT_FOR_JOBS]:
        body = f"{{{GOOD[route]}, {option}}}".encode("utf-8", "surrogateescape")
        yield pytest.param(route, body, id=f"{route} {option[:40]}")
    for route, messages in itertools.product((JOBS, CHAT), NOT_MESSAGES):
        yield pytest.param(route, f'{{"messages": {messages}}}'.encode(), id=f"{route} {messages}")
    for route, prompt in itertools.product((JOBS, COMPLETIONS), NOT_A_PROMPT):
        yield pytest.param(route, f'{{"prompt": {prompt}}}'.encode(), id=f"{route} {prompt}")


@pytest.mark.parametrize(("route", "body"), list(_bad_bodies()))
def test_a_bad_body_is_refused(shared_stack: Stack, route: str, body: bytes) -> None:
    """400 in the shape that the route speaks, and no job."""
    known = _accepted(shared_stack)
    _assert_refused(_post(shared_stack, route, body), 400)
    assert _accepted(shared_stack) == known


def test_the_refusal_names_the_field(shared_stack: Stack) -> None:
    """`param` says what to mend, on every route; and `code` can be relied on."""
    for route in ROUTES:
        answer = _post(shared_stack, route, f'{{{GOOD[route]}, "max_tokens": "5"}}'.encode())
        error = answer.json() if route == JOBS else answer.json()["error"]
        assert (error["param"], error["code"]) == ("max_tokens", "invalid_request")


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ("[]", None, "the body must be an object"),
        ('{"prompt": 5}', "prompt", "prompt must be a string"),
        ('{"prompt": ""}', "prompt", "prompt must not be empty"),
        (
            '{"prompt": "x", "stop": {}}',
            "stop",
            "stop must be a string or an array",
        ),
        (
            f'{{"prompt": "x", "stop": {["x"] * 17}}}'.replace("'", '"'),
            "stop",
            "stop must have at most 16 items",
        ),
        (
            '{"prompt": "x", "temperature": 2.5}',
            "temperature",
            "temperature must be at most 2",
        ),
        ('{"prompt": "x", "timeout_s": 0}', "timeout_s", "timeout_s must be more than 0"),
        (
            '{"prompt": "x", "priority": "urgent"}',
            "priority",
            "priority must be high or low or normal, not 'urgent'",
        ),
        (
            '{"prompt": "x", "response_format": {"type": "yaml"}}',
            "response_format.type",
            "response_format.type must be text or json_object or json_schema or grammar or "
            "regex, not 'yaml'",
        ),
        (
            '{"messages": [{"role": "robot", "content": "x"}]}',
            "messages[0].role",
            "messages[0].role must be assistant or system or tool or user, not 'robot'",
        ),
        (
            '{"messages": [{"role": "user"}]}',
            "messages[0].content",
            "messages[0].content is missing",
        ),
        (
            '{"prompt": "x", "max_token": 5}',
            "max_token",
            "max_token is not a field of this request; did you mean max_tokens?",
        ),
        (
            '{"prompt": "x", "colour": 5}',
            "colour",
            "colour is not a field of this request; the fields are max_tokens, temperature, "
            "top_p, top_k, min_p, seed, n, stop, repeat_penalty, presence_penalty, "
            "frequency_penalty, response_format, logit_bias, min_tokens, ignore_eos, "
            "stop_token_ids, logprobs, top_logprobs, adapter, cache_prompt, messages, prompt, "
            "prompt_tokens, tools, tool_choice, parallel_tool_calls, chat_template_kwargs, model, "
            "input, dimensions, query, documents, top_n, return_documents, timeout_s, priority, "
            "metadata",
        ),
        (
            "{}",
            None,
            "give exactly one of `messages`, `prompt`, `prompt_tokens`, `input` and `query`",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_refusal_says_what_is_allowed(
    shared_stack: Stack, body: str, param: str | None, sentence: str
) -> None:
    """In words that need no knowledge of how it was found out."""
    problem = _post(shared_stack, JOBS, body.encode()).json()
    assert (problem["detail"], problem.get("param")) == (sentence, param)


@pytest.mark.parametrize("route", ROUTES)
def test_parameters_in_the_url_are_not_ignored(shared_stack: Stack, route: str) -> None:
    """They belong in the body. `beta` is what the official client's `beta` resources add."""
    body = f'{{{GOOD[route]}, "max_tokens": 1}}'.encode()
    answer = _post(shared_stack, f"{route}?stream=true", body)
    _assert_refused(answer, 400)
    error = answer.json() if route == JOBS else answer.json()["error"]
    assert error["param"] == "stream"
    assert "parameters belong in the body" in answer.text
    assert _post(shared_stack, f"{route}?beta=true", body).is_success


@pytest.mark.parametrize("route", ROUTES)
def test_a_compressed_body_is_refused_as_such(shared_stack: Stack, route: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = gzip.compress(f"{{{GOOD[route]}}}".encode())
    answer = shared_stack.http.post(route, content=body, headers=headers)
    _assert_refused(answer, 400)
    assert "Content-Encoding" in answer.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", ["nope", "No Such", "a.b", " ", "tiny+high", "tiny.*", ">", "ü"])
def test_an_unknown_or_ill_formed_model_is_404(shared_stack: Stack, route: str, model: str) -> None:
    """404 before anything is accepted."""
    known = _accepted(shared_stack)
    body = f'{{{GOOD[route]}, "model": {json.dumps(model)}}}'
    answer = _post(shared_stack, route, body.encode())
    _assert_refused(answer, 404)
    assert "model_not_found" in answer.text
    assert _accepted(shared_stack) == known


UUID7_OF_THE_YEAR_10889 = "ffffffff-ffff-7fff-bfff-ffffffffffff"
UUID4 = "9f0b4d2e-8b6a-4c3e-9f2a-0d1c2b3a4f5e"


@pytest.mark.parametrize(
    "method_and_path", ["GET /status/", "GET /jobs/{}/events", "DELETE /jobs/"]
)
@pytest.mark.parametrize("job_id", ["x", "*", UUID4, UUID7_OF_THE_YEAR_10889])
def test_an_ill_formed_id_is_404(shared_stack: Stack, method_and_path: str, job_id: str) -> None:
    """For status, events and cancel alike."""
    method, _, path = method_and_path.partition(" ")
    path = path.format(job_id) if "{}" in path else path + job_id
    _assert_refused(shared_stack.http.request(method, path), 404)


@pytest.mark.parametrize("last", ["x", "-1", "9" * 5_000, "1.5"])
def test_a_bad_last_event_id_starts_from_the_beginning_or_is_refused(
    shared_stack: Stack, last: str
) -> None:
    """Never a fault of the gateway."""
    job_id = shared_stack.submit(prompt="hi", max_tokens=1)
    path, headers = f"/jobs/{job_id}/events", {"last-event-id": last}
    with shared_stack.http.stream("GET", path, headers=headers) as response:
        assert response.status_code in (200, 400)
        if response.status_code == 200:
            assert [event["event"] for event in server_sent_events(response)][-1] == "result"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize("size", [LIMIT + 1, 5_000_000, 30_000_000])
def test_a_body_over_the_limit_is_413(
    shared_stack: Stack, route: str, chunked: bool, size: int
) -> None:
    """The client reads the answer, whether or not it said how much would come."""
    known = _accepted(shared_stack)
    body = _body_of(size)
    _assert_refused(_post(shared_stack, route, iter([body]) if chunked else body), 413)
    assert _accepted(shared_stack) == known


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize("size", [LIMIT + 1, 5_000_000, 30_000_000])
def test_a_client_that_sends_everything_first_sees_the_413(
    shared_stack: Stack, chunked: bool, size: int
) -> None:
    """Nothing is reset under a client that does not read while it writes."""
    url = httpx2.URL(shared_stack.url)
    body = _body_of(size)
    head = f"POST /jobs HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n".encode()
    if chunked:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head += b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(head + body)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"status":413' in answer


def test_a_prompt_that_cannot_fit_is_refused_at_once(shared_stack: Stack) -> None:
    """400 where its bytes alone say that it has too many tokens."""
    known = _accepted(shared_stack)
    text = "word " * 400_000
    messages = {"messages": [{"role": "user", "content": text}]}
    for route, body in ((JOBS, {"prompt": text}), (JOBS, messages), (CHAT, messages)):
        answer = _post(shared_stack, route, json.dumps(body).encode())
        _assert_refused(answer, 400)
        assert "prompt_too_long" in answer.text
    assert _accepted(shared_stack) == known


def test_options_at_their_limits_are_accepted(stack: Stack) -> None:
    """What is within the bounds runs: no value of an option may take the inferer down."""
    limits: dict[str, tuple[float, ...]] = {
        "temperature": (0, 1e-40, 2),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "top_k": (0, 1, 2**31 - 1),
        "seed": (-(2**63), 2**32 - 1, 2**63 - 1),
        "repeat_penalty": (1e-40, 1.1, 10),
        "min_tokens": (0, 3),
    }
    options: list[dict[str, Any]] = [
        {name: value} for name, values in limits.items() for value in values
    ]
    options += [{"logit_bias": {"5": bias, "6": -bias}} for bias in (-100, 0, 100)]
    options += [{"logprobs": True, "top_logprobs": top} for top in (0, 20)]
    options += [{"ignore_eos": True}, {"stop_token_ids": [0, 5]}, {"stop_token_ids": []}]
    options += [{"presence_penalty": p, "frequency_penalty": p} for p in (-2, 2)]
    for option in options:
        ended = _end_of(stack, prompt="hi", max_tokens=3, **option)
        assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1), (option, ended["error"])


def test_a_schema_that_is_too_much_work_fails_its_job_only(stack: Stack) -> None:
    """The inferer lives on and the next job completes."""
    wanted = {"type": "json_schema", "json_schema": {"schema": TOO_MUCH}}
    ended = _end_of(stack, prompt="hi", max_tokens=20, response_format=wanted)
    assert (ended["state"], ended["attempts"]) == ("FAILURE", 1)
    assert _end_of(stack, prompt="hi", max_tokens=2)["state"] == "SUCCESS"


def test_a_hostile_schema_does_not_hold_up_the_gateway(stack: Stack) -> None:
    """200 kB that take a validator a quarter of an hour are refused before it sees them."""
    kinds = ["string", *({"a": number} for number in range(20_000))]
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": kinds}}}
    body = {"prompt": "hi", "response_format": wanted}
    _assert_refused(_post(stack, JOBS, json.dumps(body).encode()), 400)


def _end_of(stack: Stack, **body: Any) -> dict[str, Any]:
    """How a job ends; fails at once when the inferer does not outlive it."""
    job_id = stack.submit(**body)

    def check() -> dict[str, Any] | None:
        assert stack.inferers[0].popen.poll() is None, (body, stack.inferers[0].output()[-2000:])
        status = stack.status(job_id)
        return status if status["finished_at"] else None

    return eventually(check, f"{body} has ended")


def test_afterwards_everything_is_as_before(shared_stack: Stack) -> None:
    """A good job completes, the queue is empty, all that was accepted ended, nothing crashed."""
    job_id = shared_stack.submit(prompt="hi", max_tokens=2)
    assert shared_stack.wait_for_end(job_id)["state"] == "SUCCESS"
    gateway, inferer = shared_stack.gateways[0], shared_stack.inferers[0]
    eventually(
        lambda: {e["job_id"] for e in inferer.events("job_finished")} == _accepted(shared_stack),
        "all that was accepted has ended",
    )
    eventually(lambda: _unfinished(shared_stack) == 0, "the queue is empty")
    for log in (gateway.output(), inferer.output()):
        assert "Traceback" not in log
        assert "crashed" not in log
        assert '"level": "error"' not in log


def _unfinished(stack: Stack) -> int:
    (queue,) = stack.http.get("/queue").json()["models"]
    return int(queue["waiting"] + queue["in_flight"])


def _post(stack: Stack, route: str, body: bytes | Iterator[bytes]) -> httpx2.Response:
    return stack.http.post(route, content=body, headers={"content-type": "application/json"})


def _accepted(stack: Stack) -> set[str]:
    return {event["job_id"] for event in stack.gateways[0].events("request_accepted")}


def _body_of(size: int) -> bytes:
    return b'{"prompt": "' + b"a" * (size - 14) + b'"}'


def _assert_refused(answer: httpx2.Response, status: int) -> None:
    """The status, and the error body of the route's kind."""
    assert answer.status_code == status, answer.text[:500]
    body = answer.json()
    path = answer.request.url.path
    if path.startswith("/v1/"):
        assert answer.headers["content-type"].startswith("application/json")
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["message"]
    else:
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert body["status"] == status
        assert body["instance"] == path
        assert all(body[name] for name in ("type", "title", "detail"))
