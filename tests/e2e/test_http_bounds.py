"""What one client may take of a gateway: heads, time, connections, and what it does not read."""

import json
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

import httpx2
import pytest

from tests.support.processes import Stack, eventually
from tests.support.wire import ask, connect, get, is_closed, read_answer

SHORT = {
    "GATEWAY_HEAD_TIMEOUT_S": "1",
    "GATEWAY_BODY_TIMEOUT_S": "1",
    "GATEWAY_SEND_TIMEOUT_S": "1",
}


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway with a second for everything."""
    with Stack(tmp_path_factory.mktemp("impatient")) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny", **SHORT)
        _wait_until_ready(stack)
        yield stack


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway that takes ten connections."""
    with Stack(tmp_path_factory.mktemp("crowded")) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny", GATEWAY_MAX_CONNECTIONS="10")
        _wait_until_ready(stack)
        yield stack


def _wait_until_ready(stack: Stack) -> None:
    def check() -> bool:
        try:
            with httpx2.Client() as client:
                return client.get(f"{stack.url}/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    eventually(check, "the gateway is ready")


def _memory_mb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("X: " + "a" * 100_000, 431),
        ("X" * 100_000 + ": a", 431),
        ("\r\n".join(f"X{number}: {'a' * 1000}" for number in range(100)), 431),
        ("\r\n".join(f"X{number}: a" for number in range(200)), 431),
        ("X: " + "a" * 60_000, 200),
    ],
    ids=["a long value", "a long name", "many long lines", "many lines", "just fits"],
)
def test_a_large_head_is_431(impatient: Stack, head: str, status: int) -> None:
    """In the form of the other errors, and the client reads it though it has sent more."""
    answered, body = ask(impatient.url, get(impatient.url, "/healthz", head))
    assert answered == status, body
    if status != 200:
        assert json.loads(body)["code"] == "head_too_large"


def test_a_long_url_is_414(impatient: Stack) -> None:
    """A query of 20 kB."""
    status, body = ask(impatient.url, get(impatient.url, "/queue?" + "a" * 20_000))
    assert (status, json.loads(body)["code"]) == (414, "url_too_long")


def test_a_head_without_end_takes_no_memory(impatient: Stack) -> None:
    """However much is sent: as one value, as lines, as trailers of a body, as a chunk's
    extension."""
    gateway = impatient.gateways[0]
    host = f"Host: {httpx2.URL(impatient.url).netloc.decode()}\r\n".encode()
    post = b"POST /jobs HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n"
    before = _memory_mb(gateway.pid)
    for beginning, part in (
        (b"GET /healthz HTTP/1.1\r\n" + host + b"X: ", b"a" * 65536),
        (b"GET /healthz HTTP/1.1\r\n" + host, b"X: aaaaaaaaaa\r\n" * 5000),
        (b"GET /", b"a" * 65536),
        (post + b"0\r\n", b"X: aaaaaaaaaa\r\n" * 5000),
        (post + b"0\r\nX: ", b"a" * 65536),
        (post + b"1;", b"a" * 65536),
    ):
        with connect(impatient.url) as connection, suppress(OSError):
            connection.sendall(beginning)
            for _ in range(600):
                connection.sendall(part)
    assert _memory_mb(gateway.pid) - before < 50


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nX: "]
)
def test_a_head_that_does_not_come_is_408(impatient: Stack, sent: bytes) -> None:
    """A connection that has said nothing is closed without a word."""
    with connect(impatient.url) as connection:
        connection.sendall(sent)
        status, body = read_answer(connection)
    assert status == (408 if sent.strip() else 0), body


def test_a_head_of_a_byte_at_a_time_is_408(impatient: Stack) -> None:
    """Each byte is progress, and still the head has its time."""
    with connect(impatient.url) as connection:
        connection.settimeout(0.2)
        sent, answer = 0, b""
        while not answer:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX: "[sent : sent + 1] or b"a")
            sent += 1
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                assert sent < 200, "never refused"
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"], ids=["length", "chunked"]
)
def test_a_body_that_does_not_come_is_408(impatient: Stack, framing: bytes) -> None:
    """Half of it, then nothing; on another connection the next request is answered."""
    host = httpx2.URL(impatient.url).netloc
    head = b"POST /jobs HTTP/1.1\r\nHost: " + host + b"\r\n" + framing + b"\r\n\r\n"
    half = b'5\r\n{"pro' if framing.startswith(b"T") else b'{"pro'
    with connect(impatient.url) as connection:
        connection.sendall(head + half)
        status, body = read_answer(connection)
    assert (status, json.loads(body)["code"]) == (408, "request_timeout")
    assert ask(impatient.url, get(impatient.url))[0] == 200


def test_an_answer_that_nobody_reads_is_cut_off(impatient: Stack) -> None:
    """The connection goes, with everything that was to be sent on it."""
    gateway = impatient.gateways[0]
    before = _descriptors(gateway.pid)
    with connect(impatient.url, receive_bytes=4096) as connection:
        one = get(impatient.url, "/schema/openapi.json", close=False)
        for _ in range(300):
            try:
                connection.sendall(one)
            except OSError:
                break
            if _is_reset(connection):
                break
        eventually(lambda: _descriptors(gateway.pid) <= before, "the connection is gone")


def _is_reset(connection: socket.socket) -> bool:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def test_a_flood_of_pipelined_requests_is_refused(impatient: Stack) -> None:
    """Thousands behind one that takes long: they are not kept."""
    wait = get(impatient.url, "/healthz", close=False)
    with connect(impatient.url) as connection:
        job = json.dumps({"prompt": "x"}).encode()
        head = (
            f"POST /jobs HTTP/1.1\r\nHost: {httpx2.URL(impatient.url).netloc.decode()}\r\n"
            f"Prefer: wait=30\r\nContent-Length: {len(job)}\r\n\r\n"
        )
        connection.sendall(head.encode() + job)
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(wait * 100)
        eventually(lambda: is_closed(connection), "the connection is closed")


def test_a_few_pipelined_requests_are_answered_in_order(impatient: Stack) -> None:
    """What HTTP/1.1 allows."""
    paths = ["/healthz", "/queue", "/nothing", "/healthz"]
    requests = [get(impatient.url, path, close=False) for path in paths[:-1]]
    with connect(impatient.url) as connection:
        connection.sendall(b"".join(requests) + get(impatient.url, paths[-1]))
        received = b""
        while part := connection.recv(65536):
            received += part
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", received)
    assert statuses == [b"200", b"200", b"404", b"200"]


def test_a_pipelined_request_is_not_taken_for_idleness(tmp_path: Path) -> None:
    """It began before the answer to the one ahead of it had ended: it may take longer to answer
    than a connection may be idle."""
    with Stack(tmp_path) as stack, ExitStack() as open_ones:
        stack.start_gateway(GATEWAY_MODELS="tiny", GATEWAY_KEEP_ALIVE_S="1")
        _wait_until_ready(stack)
        job = json.dumps({"prompt": "x"}).encode()
        host = httpx2.URL(stack.url).netloc.decode()
        request = (
            f"POST /jobs HTTP/1.1\r\nHost: {host}\r\nPrefer: wait=4\r\n"
            f"Content-Length: {len(job)}\r\n\r\n"
        ).encode() + job
        connection = open_ones.enter_context(connect(stack.url))
        answers = open_ones.enter_context(connection.makefile("rb"))
        connection.sendall(request + request[:10])
        assert read_status(answers) == 202
        connection.sendall(request[10:])
        assert read_status(answers) == 202


def read_status(answers: BufferedReader) -> int:
    """The status of the next answer, which is read to its end: it comes in any number of pieces."""
    status = int(answers.readline().split()[1])
    length = 0
    while line := answers.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    answers.read(length)
    return status


def test_idle_connections_make_room_for_others(crowded: Stack) -> None:
    """Thirty silent ones at a gateway that takes ten: every new one is served."""
    with ExitStack() as open_ones:
        silent = [open_ones.enter_context(connect(crowded.url)) for _ in range(30)]
        for _ in range(5):
            assert ask(crowded.url, get(crowded.url, "/queue"))[0] == 200
        eventually(lambda: sum(map(is_closed, silent)) >= 20, "the oldest were closed")
        assert not is_closed(silent[-1])


def test_beyond_the_bound_only_health_checks_are_answered(crowded: Stack) -> None:
    """503 with Retry-After while as many streams as connections are allowed are open; afterwards
    all is as before."""
    with httpx2.Client(base_url=crowded.url) as client:
        job_id = client.post("/jobs", json={"prompt": "x"}).json()["id"]
    with ExitStack() as open_ones:
        for _ in range(10):
            connection = open_ones.enter_context(connect(crowded.url))
            connection.sendall(get(crowded.url, f"/jobs/{job_id}/events", close=False))
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
        for path, expected in (("/healthz", 200), ("/readyz", 200), ("/queue", 503)):
            status, body = ask(crowded.url, get(crowded.url, path))
            assert status == expected, body
        answer = httpx2.get(f"{crowded.url}/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "too_many_connections"
    eventually(
        lambda: ask(crowded.url, get(crowded.url, "/queue"))[0] == 200, "there is room again"
    )


def test_an_idle_connection_outlives_those_of_proxies(crowded: Stack) -> None:
    """More than 5 s, which was uvicorn's, so that nothing is reset under a pooled client."""
    with connect(crowded.url) as connection:
        connection.sendall(get(crowded.url, close=False))
        connection.settimeout(1)
        answer = b""
        with suppress(TimeoutError):  # head and body may come apart
            while part := connection.recv(65536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        connection.settimeout(8)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_two_thousand_silent_connections_leave_the_gateway_serving(tmp_path: Path) -> None:
    """Started from a shell with a soft limit of 1024 open files, the gateway raises it as
    nats-server does; health checks are answered, and requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with Stack(tmp_path) as stack, ExitStack() as open_ones:
            stack.start_gateway(GATEWAY_MODELS="tiny")
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
            _wait_until_ready(stack)
            for _ in range(2000):
                open_ones.enter_context(connect(stack.url))
            for path in ("/healthz", "/readyz", "/queue"):
                assert ask(stack.url, get(stack.url, path))[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
