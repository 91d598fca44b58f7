"""The gateway's NATS service, from the real `nats` command and from nats-py."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any

import jsonschema_rs
import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared.job_ids import new_job_id
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, Stack, clean_environment, eventually

CHAT = '{"messages":[{"role":"user","content":"hi"}],"max_tokens":%d}'
Nats = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run_nats(shared_stack: Stack, nats_command: str) -> Nats:
    """Run the `nats` command against the shared stack; it must succeed."""

    def check(arguments: tuple[str, ...]) -> "subprocess.CompletedProcess[str] | None":
        ended = subprocess.run(
            [nats_command, "-s", shared_stack.nats.url, *arguments],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        # It gives up connecting after two seconds, which a busy machine may well take.
        return None if "setup failed" in ended.stderr else ended

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        ended = eventually(lambda: check(arguments), "the nats command connects")
        assert ended.returncode == 0, ended.stderr
        return ended

    return run


@pytest.fixture
async def client(shared_stack: Stack) -> AsyncIterator[Client]:
    connection = await nats.connect(shared_stack.nats.url)
    yield connection
    await connection.close()


def test_nats_req_prints_the_answer(run_nats: Nats) -> None:
    """A chat from the command line, with nothing but the `nats` command."""
    answer = json.loads(run_nats("req", "infer.chat", CHAT % 5, "--raw", "--timeout=1m").stdout)
    assert (answer["outcome"], answer["task"]) == ("completed", "chat")
    assert answer["text"]
    assert answer["usage"]["completion_tokens"] == 5


def test_nats_req_prints_a_stream(run_nats: Nats) -> None:
    """With `stream` the tokens come first, then the result, then the empty end."""
    body = '{"prompt":"go on","max_tokens":60,"stream":true}'
    options = ("--raw", "--wait-for-empty", "--timeout=1m")
    shown = run_nats("req", "infer.complete", body, *options).stdout
    *frames, result = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    assert len(frames) > 1
    assert "".join(text for frame in frames for text in frame["tokens"]) == result["text"]


async def test_a_stream_arrives_in_an_inbox(client: Client) -> None:
    """Frames without a gap, the result, one empty message, and then nothing more."""
    messages = await _ask(client, "infer.chat", {**json.loads(CHAT % 40), "stream": True})
    *frames, result = [json.loads(message.data) for message in messages[:-1]]
    assert messages[-1].data == b""
    indices = [frame["index"] for frame in frames]
    lengths = [len(frame["tokens"]) for frame in frames]
    assert indices == [sum(lengths[:position]) for position in range(len(frames))]
    assert sum(lengths) == result["usage"]["completion_tokens"] == 40
    assert result["outcome"] == "completed"


async def test_a_job_is_found_and_cancelled_by_its_id(client: Client) -> None:
    """submit, status, result, cancel and queue, as over HTTP."""
    running = await _call(client, "infer.submit", {"prompt": "go on", "max_tokens": 4000})
    waiting = await _call(client, "infer.submit", {"prompt": "wait", "metadata": {"a": 1}})
    assert running["state"] == "PENDING"

    found = await _call(client, "infer.status", {"id": waiting["id"]})
    assert (found["state"], found["metadata"]) == ("PENDING", {"a": 1})
    assert await _refusal(client, "infer.result", waiting["id"]) == "409"
    (queue,) = (await _call(client, "infer.queue"))["models"]
    assert (queue["model"], queue["waiting"], queue["limit"]) == ("tiny", 1, 1)

    for job in (waiting, running):
        cancelled = await _call(client, "infer.cancel", {"id": job["id"]})
        assert cancelled["state"] == "REVOKED"
        result = await _call(client, "infer.result", job["id"])  # a bare id will do
        assert (result["outcome"], result["code"]) == ("cancelled", "cancelled")


@pytest.mark.parametrize(
    ("endpoint", "body", "code"),
    [
        ("chat", "hi", "400"),
        ("chat", "", "400"),
        ("chat", "[]", "400"),
        ("chat", b"\xff", "400"),
        ("chat", {"prompt": "hi"}, "400"),
        ("chat", {"messages": []}, "400"),
        ("chat", {"messages": [{"role": "user", "content": "hi"}], "model": "nope"}, "404"),
        ("complete", {"prompt": "hi", "max_tokens": "5"}, "400"),
        ("complete", {"prompt": "hi", "max_tokens": 5000}, "400"),
        ("complete", {"prompt": "hi", "max_token": 5}, "400"),
        ("complete", {"prompt": "hi", "a\r\nInjected: yes": 5}, "400"),
        ("complete", {"prompt": "hi", "model": "No\r\nSuch: model"}, "404"),
        ("complete", {"prompt": "word " * 400_000}, "400"),
        ("submit", {"prompt": "hi", "stream": True}, "400"),
        ("submit", {}, "400"),
        *((name, {"id": "x"}, "404") for name in ("status", "result", "cancel")),
        *((name, {"id": 5}, "400") for name in ("status", "result", "cancel")),
        ("status", "ffffffff-ffff-7fff-bfff-ffffffffffff", "404"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_an_invalid_request_is_a_service_error(
    shared_stack: Stack, client: Client, endpoint: str, body: Any, code: str
) -> None:
    """ADR-32's two headers, nothing else in them, and no job."""
    known = await _accepted(shared_stack, client)
    assert await _refusal(client, f"infer.{endpoint}", body) == code
    assert await _accepted(shared_stack, client) == known + 1


@pytest.mark.parametrize("depth", [100, 900, 975, 980, 985, 990, 5000])
async def test_nesting_is_refused_or_can_be_read_back(
    shared_stack: Stack, client: Client, depth: int
) -> None:
    """Whatever depth a gateway accepts, every reader of the job can decode."""
    body = '{"prompt":"hi","max_tokens":1,"metadata":{"deep":' + "[" * depth + "]" * depth + "}}"
    answer = await client.request("infer.submit", body.encode(), timeout=30)
    if answer.headers:
        assert answer.headers["Nats-Service-Error-Code"] == "400"
    else:
        path = f"/status/{json.loads(answer.data)['id']}"
        # Not decoded here: this process has a limit of its own.
        eventually(lambda: '"state":"SUCCESS"' in shared_stack.http.get(path).text, "read back", 10)


ENDPOINTS = {
    "chat": CHAT % 2,
    "complete": '{"prompt":"hi","max_tokens":2}',
    "submit": '{"prompt":"hi","max_tokens":2}',
    "status": "x",
    "result": "x",
    "cancel": "x",
    "queue": "",
    "inferers": "",
    "concurrency": '{"concurrency":1}',
}
AIMED_AT = (
    "somewhere.else",
    "$JS.API.STREAM.DELETE.REQUESTS",
    "$JS.API.STREAM.PURGE.REQUESTS",
    "infer.results.tiny.{id}",
    "infer.requests.tiny.normal.public.{id}",
    "$KV.INFERERS.{id}",
    "$JS.ACK.REQUESTS.tiny.1.1.1.1.0",
    "_INBOX_x.{id}.>",
)


@pytest.mark.parametrize("target", AIMED_AT)
async def test_a_reply_goes_to_inboxes_only(
    shared_stack: Stack, client: Client, target: str
) -> None:
    """Neither an answer nor a refusal, from no endpoint, not from the service's own `$SRV` nor from
    an inferer: with a gateway's rights they could delete the queue or decide somebody's job."""
    target = target.format(id=new_job_id())
    jetstream = client.jetstream()
    streams = await jetstream.streams_info()
    received = await client.subscribe(target)
    accepted = await _accepted(shared_stack, client)

    asked = [(f"infer.{name}", body) for name, body in ENDPOINTS.items()]
    asked += [(f"infer.{name}", "nonsense") for name in ENDPOINTS]
    asked += [(f"$SRV.{verb}", "") for verb in ("PING", "INFO", "STATS", "PING.sluice")]
    asked += [("infer.control.tiny.inferer-0", body) for body in ("{}", '{"concurrency":1}')]
    for subject, body in asked:
        await client.publish(subject, body.encode(), reply=target)
    for subject in {subject for subject, _ in asked}:
        await client.request(subject, b"nonsense", timeout=PATIENCE_S)
    await flush(client)
    assert received.pending_msgs == 0
    assert await _accepted(shared_stack, client) == accepted + 1
    left = {info.config.name: info.state.messages for info in await jetstream.streams_info()}
    assert left.keys() == {info.config.name for info in streams}


async def _accepted(stack: Stack, client: Client) -> int:
    """How many jobs were accepted, with one that ends now: log lines come later than a reply, but
    in their order."""
    result = await _call(client, "infer.complete", {"prompt": "hi", "max_tokens": 2})
    assert result["text"]
    async with asyncio.timeout(PATIENCE_S):
        while True:
            accepted = stack.gateways[0].events("request_accepted")
            if any(event["job_id"] == result["id"] for event in accepted):
                return len(accepted)
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "reply_to", ["somewhere.else", "infer.results.tiny.{id}", "_INBOX.a.\udcff"]
)
async def test_a_reply_to_header_reaches_inboxes_only(
    shared_stack: Stack, client: Client, reply_to: str
) -> None:
    """`Reply-To` in a request that somebody has published by hand: the job ends, unanswered."""
    job_id = new_job_id()
    target = reply_to.format(id=new_job_id())
    inbox = client.new_inbox()
    acknowledged = await client.subscribe(inbox)
    received = await client.subscribe("somewhere.>")
    header = f"NATS/1.0\r\nReply-To: {target}\r\n\r\n".encode("utf-8", "surrogateescape")
    body = b'{"task":"complete","prompt":"a","max_tokens":2,"stream":true}'
    subject = f"infer.requests.tiny.normal.public.{job_id}"
    # nats-py encodes its headers, so the bytes are written as they are.
    await client._send_command(
        f"HPUB {subject} {inbox} {len(header)} {len(header + body)}\r\n".encode()
        + header
        + body
        + b"\r\n"
    )
    await client._flush_pending()
    await acknowledged.next_msg(timeout=PATIENCE_S)
    assert shared_stack.wait_for_end(job_id)["state"] == "SUCCESS"
    await flush(client)
    assert received.pending_msgs == 0
    assert shared_stack.inferers[0].popen.poll() is None


async def test_a_chat_without_a_reply_subject_is_refused_and_a_job_is_accepted(
    shared_stack: Stack, client: Client
) -> None:
    """A chat is refused in the log; a job can be submitted without a reply."""
    refused = len(shared_stack.gateways[0].events("nats_request_refused"))
    accepted = len(shared_stack.gateways[0].events("request_accepted"))
    for endpoint, body in (("chat", CHAT % 2), ("chat", "nonsense"), ("status", "x")):
        await client.publish(f"infer.{endpoint}", body.encode())
    await client.publish("infer.submit", ENDPOINTS["submit"].encode())
    await flush(client)
    shared_stack.gateways[0].wait_for("nats_request_refused", refused + 3)
    shared_stack.gateways[0].wait_for("request_accepted", accepted + 1)
    assert "Traceback" not in shared_stack.gateways[0].output()


async def test_a_request_that_would_close_the_connection_is_refused(
    shared_stack: Stack, client: Client
) -> None:
    """The server counts headers too, and closes the connection of who sends too much: the gateway
    says so before, and what it says of it is short."""
    largest = client.max_payload
    # Next to the payload's length a subject this long fills the server's line.
    await client.publish("infer.chat", (CHAT % 2).encode(), reply=f"_INBOX.{'x' * 3900}")

    for spare in (0, 100, 8192):
        body = _padded('{"prompt":"hi","max_tokens":1,"stop":"%s"}', largest - spare)
        assert await _refusal(client, "infer.submit", body) == "413", spare
    body = _padded('{"prompt":"hi","model":"%s"}', largest)
    answer = await client.request("infer.submit", body, timeout=PATIENCE_S)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "404"
    assert len(answer.headers["Nats-Service-Error"]) <= 1000
    assert not shared_stack.gateways[0].events("broker_disconnected")
    assert (await _call(client, "infer.chat", json.loads(CHAT % 2)))["text"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("micro ls", ["sluice", "0.1.0"]),
        ("micro info sluice", ["infer.chat", "infer.submit", "infer.cancel", "infer.queue"]),
        ("micro info sluice", ["description: submit a job", "request: NatsSubmission"]),
        ("micro stats sluice", ["chat", "complete", "status", "queue"]),
        ("micro ping sluice", ["sluice", "rtt="]),
        ("stream ls", ["REQUESTS", "STATES", "EVENTS", "RESULTS", "DEAD"]),
        ("stream info REQUESTS", ["WorkQueue", "infer.requests.*.*.*.*", "infer.schedule.*.*.*.*"]),
        ("stream report", ["REQUESTS", "KV_INFERERS", "KV_IDEMPOTENCY"]),
        ("stream subjects RESULTS", ["infer.results."]),
        ("stream subjects EVENTS", ["infer.events."]),
        ("consumer ls REQUESTS", ["tiny"]),
        (
            "consumer info REQUESTS tiny",
            ["Max Ack Pending: 1", "infer.requests.tiny.normal.*.*"],
        ),
        ("consumer report REQUESTS", ["tiny", "Explicit"]),
        ("kv ls", ["INFERERS", "IDEMPOTENCY"]),
        ("kv ls INFERERS", ["tiny.inferer-0"]),
        ("kv get INFERERS tiny.inferer-0 --raw", ['"model":"tiny"']),
    ],
)
def test_the_service_is_listed_with_its_endpoints(
    shared_stack: Stack, run_nats: Nats, command: str, shown: list[str]
) -> None:
    """Each command of an operator works and names what it is about."""
    shared_stack.wait_for_end(shared_stack.submit(prompt="hi", max_tokens=2))
    output = run_nats(*command.split()).stdout
    for text in shown:
        assert text in output, output


async def test_each_endpoint_has_its_schemas(client: Client) -> None:
    """JSON Schemas of what it takes and what it answers, of every endpoint that is listed."""
    info = json.loads((await client.request("$SRV.INFO.sluice", timeout=30)).data)
    named = {endpoint["name"]: endpoint["metadata"] for endpoint in info["endpoints"]}
    assert {"chat", "submit", "cancel", "schema"} <= named.keys()
    for name, metadata in named.items():
        assert metadata["description"]
        schemas = await _call(client, "infer.schema", name)
        assert schemas.keys() == metadata.keys() - {"description"}
        for schema in schemas.values():
            jsonschema_rs.validator_for(schema)
    submission = (await _call(client, "infer.schema", "infer.submit"))["request"]
    assert "prompt" in submission["$defs"]["NatsSubmission"]["properties"]
    assert await _refusal(client, "infer.schema", "nope") == "400"
    assert await _refusal(client, "infer.schema", "") == "400"


async def test_service_errors_are_counted(client: Client) -> None:
    """`nats micro stats` is where an operator looks for them."""

    async def errors() -> int:
        stats = json.loads((await client.request("$SRV.STATS.sluice", timeout=30)).data)
        return int(next(e["num_errors"] for e in stats["endpoints"] if e["name"] == "status"))

    before = await errors()
    assert await _refusal(client, "infer.status", {"id": new_job_id()}) == "404"
    assert await errors() == before + 1


GARBAGE = {
    "no JSON": (b"\xff\x00garbage", {}),
    "empty": (b"", {}),
    "two kinds of prompt": (b'{"prompt":"a","messages":[{"role":"user","content":"b"}]}', {}),
    "a deadline that is not a time": (b'{"prompt":"a"}', {"Deadline": "tomorrow"}),
    "a deadline without a zone": (b'{"prompt":"a"}', {"Deadline": "2040-01-01T00:00:00"}),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_a_message_by_hand_that_is_not_a_request_is_dead_lettered(
    shared_stack: Stack, client: Client, kind: str
) -> None:
    """A dead letter, an error to Reply-To, and the queue goes on."""
    data, headers = GARBAGE[kind]
    job_id, inbox = new_job_id(), client.new_inbox()
    answers = await client.subscribe(inbox)
    jetstream = client.jetstream()
    await jetstream.publish(
        f"infer.requests.tiny.normal.public.{job_id}", data, headers={**headers, "Reply-To": inbox}
    )
    answer = json.loads((await answers.next_msg(timeout=30)).data)
    assert (answer["outcome"], answer["code"]) == ("failed", "invalid_request")
    stored = await jetstream.get_last_msg("DEAD", f"infer.dead.tiny.{job_id}")
    letter = json.loads(stored.data or b"")
    assert (letter["id"], letter["code"]) == (job_id, "invalid_request")
    assert letter["request"] == data.decode("utf-8", "replace")
    assert shared_stack.status(job_id)["state"] == "FAILURE"
    assert (await _call(client, "infer.complete", {"prompt": "a", "max_tokens": 2}))["text"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Reply-To": "_INBOX.a b c"},
        {"Reply-To": "_INBOX.>"},
        {"Reply-To": "_INBOX." + "x" * 60_000},
        {"Status": "100"},
        {"Status": "404"},
    ],
    ids=lambda headers: str(headers)[:40],
)
async def test_a_message_by_hand_with_a_hostile_header_does_no_harm(
    stack: Stack, headers: dict[str, str]
) -> None:
    """It harms nobody but itself: the inferer lives on and takes the next job."""
    client = await nats.connect(stack.nats.url)
    subject = f"infer.requests.tiny.normal.public.{new_job_id()}"
    await client.jetstream().publish(
        subject, b'{"prompt":"a","max_tokens":2}', headers=dict(headers)
    )
    await client.close()
    assert stack.wait_for_end(stack.submit(prompt="next", max_tokens=2))["state"] == "SUCCESS"
    assert stack.inferers[0].popen.poll() is None


async def test_a_caller_is_answered_although_its_gateway_died(stack: Stack) -> None:
    """kill -9 after a chat was accepted: the inferer itself answers."""
    client = await nats.connect(stack.nats.url)
    answers = await client.subscribe(client.new_inbox())
    await client.publish("infer.chat", (CHAT % 2000).encode(), reply=answers.subject)
    await flush(client)
    stack.gateways[0].wait_for("request_accepted")
    stack.gateways[0].kill()
    assert not stack.inferers[0].events("job_finished")
    answer = json.loads((await answers.next_msg(timeout=PATIENCE_S)).data)
    assert answer["outcome"] == "completed"
    await client.close()


async def test_a_deadline_that_passes_without_an_inferer_is_reported(stack: Stack) -> None:
    """The caller that waits for the answer gets it, although nobody else asks."""
    stack.inferers[0].terminate()
    client = await nats.connect(stack.nats.url)
    answer = await _call(client, "infer.complete", {"prompt": "hi", "timeout_s": 0.5})
    assert (answer["outcome"], answer["code"]) == ("expired", "deadline_passed")
    await client.close()


async def test_a_cancelled_job_ends_although_its_inferer_is_lost(stack: Stack) -> None:
    """Nobody holds it any more: who cancels it answers its caller."""
    client = await nats.connect(stack.nats.url)
    answers = await client.subscribe(client.new_inbox())
    await client.publish("infer.chat", (CHAT % 4000).encode(), reply=answers.subject)
    await flush(client)
    job_id = stack.gateways[0].wait_for("request_accepted")["job_id"]
    stack.wait_for_state(job_id, "STARTED")
    stack.inferers[0].kill()
    await _call(client, "infer.cancel", job_id)
    answer = json.loads((await answers.next_msg(timeout=PATIENCE_S)).data)
    assert (answer["id"], answer["outcome"]) == (job_id, "cancelled")
    await client.close()


async def test_a_gateway_that_stops_answers_its_waiting_callers(stack: Stack) -> None:
    """Who came second with a key is answered by the gateway alone, and has to ask again."""
    client = await nats.connect(stack.nats.url)
    key = {"Idempotency-Key": "one"}
    inboxes = [await client.subscribe(client.new_inbox()) for _ in range(2)]
    for number, inbox in enumerate(inboxes):
        await client.publish("infer.chat", (CHAT % 4000).encode(), reply=inbox.subject, headers=key)
        await flush(client)
        stack.gateways[0].wait_for(("request_accepted", "request_repeated")[number])
    stack.gateways[0].terminate()
    refusal = await inboxes[1].next_msg(timeout=PATIENCE_S)
    assert refusal.headers is not None
    assert refusal.headers["Nats-Service-Error-Code"] == "503"
    await client.close()


async def _ask(client: Client, subject: str, body: Any) -> list[Msg]:
    """All messages of a streamed answer, up to the empty one."""
    answers = await client.subscribe(client.new_inbox())
    await client.publish(subject, json.dumps(body).encode(), reply=answers.subject)
    messages = [await answers.next_msg(timeout=PATIENCE_S)]
    while messages[-1].data:
        messages.append(await answers.next_msg(timeout=PATIENCE_S))
    await answers.unsubscribe()
    return messages


async def _call(client: Client, subject: str, body: Any = None) -> Any:
    """The answer to one request, which must not be an error."""
    answer = await client.request(subject, _bytes(body), timeout=PATIENCE_S)
    assert not answer.headers, answer.headers
    return json.loads(answer.data)


async def _refusal(client: Client, subject: str, body: Any) -> str:
    """The code of the error that answers one request."""
    answer = await client.request(subject, _bytes(body), timeout=PATIENCE_S)
    assert answer.headers is not None, answer.data
    assert set(answer.headers) == {"Nats-Service-Error", "Nats-Service-Error-Code"}
    assert answer.headers["Nats-Service-Error"]
    return answer.headers["Nats-Service-Error-Code"]


def _padded(template: str, size: int) -> bytes:
    """``template`` with its gap filled, so that it has so many bytes."""
    return (template % ("x" * (size - len(template) + len("%s")))).encode()


def _bytes(body: Any) -> bytes:
    if body is None or isinstance(body, bytes):
        return body or b""
    return (body if isinstance(body, str) else json.dumps(body)).encode()
