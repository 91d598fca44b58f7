"""What is sent to the broker by hand, or done to it, stops no process from receiving."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from tests.support.processes import PATIENCE_S, Stack, eventually

RIGHT = "max_payload: 8MB\njetstream { max_file_store: 10GB }\n"
WRONG = RIGHT + "authorization { user: somebody, password: else }\n"


@pytest.fixture
def reloadable(tmp_path: Path, tiny_model: Path) -> Iterator[tuple[Stack, Path]]:
    """A stack, and the configuration that its broker reads again when it is asked to."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text(RIGHT)
    with Stack(tmp_path, configuration) as running:
        running.serve(tiny_model)
        yield running, configuration


def test_jobs_go_on_after_a_broker_reloads_with_a_mistake(reloadable: tuple[Stack, Path]) -> None:
    """It is mended a second later. The job that ran meanwhile is not begun anew, its caller and the
    reader of its events get its result, and HTTP and NATS are served."""
    stack, configuration = reloadable
    with ThreadPoolExecutor() as clients:
        job_id = stack.submit(prompt="long", max_tokens=1500)
        reader = clients.submit(lambda: stack.http.get(f"/jobs/{job_id}/events").text)
        stack.wait_for_state(job_id, "STARTED")
        caller = clients.submit(_answer, stack, prompt="next", max_tokens=2)
        eventually(lambda: _queue(stack)["waiting"] == 1, "the caller's job waits")
        configuration.write_text(WRONG)
        stack.nats.process.popen.send_signal(signal.SIGHUP)
        for process in (*stack.gateways, *stack.inferers):
            process.wait_for("broker_disconnected")
        time.sleep(1)  # so long an operator takes at least to mend it
        configuration.write_text(RIGHT)
        stack.nats.process.popen.send_signal(signal.SIGHUP)
        assert "event: result" in reader.result(PATIENCE_S)
        assert caller.result(PATIENCE_S)["state"] == "SUCCESS"
    ended = stack.wait_for_end(job_id)
    assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
    eventually(lambda: stack.http.get("/readyz").status_code == 200, "the gateway is ready")
    assert _ask(stack, "infer.queue")
    for process in (*stack.gateways, *stack.inferers):
        assert process.popen.poll() is None
        assert "Traceback" not in process.output()


MALFORMED = {
    "headers of one byte": b"HPUB %s %s 1 1\r\nX\r\n",
    "headers without an end": b"HPUB %s %s 10 10\r\nNATS/1.0AB\r\n",
    "a status that is not UTF-8": b"HPUB %s %s 16 16\r\nNATS/1.0 \xff\xfe\xfd\r\n\r\n\r\n",
    "a description that is not UTF-8": b"HPUB %s %s 18 18\r\nNATS/1.0 503 \xff\r\n\r\n\r\n",
    "a name that is not ASCII": b"HPUB %s %s 18 18\r\nNATS/1.0\r\n\xff: \xff\r\n\r\n\r\n",
    "a body that is not UTF-8": b'PUB %s %s 4\r\n{"\xff"\r\n',
    "nothing": b"PUB %s %s 0\r\n\r\n",
    "arrays in arrays": b"PUB %s %s 5000\r\n" + b"[" * 5000 + b"\r\n",
}

DEADLY = ("headers of one byte", ("infer.results.", "infer.requests."))
"""This ends nats-server 2.15.1, where it republishes a stream: not ours to mend."""

SUBJECTS = (
    *(f"infer.{name}" for name in ("chat", "complete", "submit", "status", "result", "cancel")),
    *(f"infer.{name}" for name in ("queue", "inferers", "concurrency")),
    "infer.requests.tiny.normal.public.%s",
    "infer.requests.tiny.odd.public.%s",
    "infer.requests.tiny.normal.public." + "x" * 3900,
    "infer.schedule.tiny.normal.public.%s",
    "infer.events.tiny.%s.state",
    "infer.events.tiny.%s.tokens",
    "infer.events.tiny.\xff.state",
    "infer.results.tiny.%s",
    "infer.finished.tiny.%s",
    "infer.finished.tiny.\x0b",
    "infer.cancel.tiny.%s",
    "infer.control.tiny.inferer-0",
    "infer.dead.tiny.%s",
    "$KV.INFERERS.%s",
    "$KV.INFERERS.a.b",
    "$KV.INFERERS." + "x" * 3900,
    "$KV.IDEMPOTENCY.%s",
    "$SRV.PING",
    "$SRV.STATS.sluice",
)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_messages_on_every_subject_stop_nothing(stack: Stack, kind: str) -> None:
    """Of all that Sluice reads, with the replies of a client, of an odd one, and of none: nobody
    reconnects, no process ends, and jobs run beside them."""
    job_id = new_job_id()
    with _raw(stack.nats.port) as send:
        for subject in SUBJECTS:
            if kind == DEADLY[0] and subject.startswith(DEADLY[1]):
                continue
            for reply in (b"_INBOX.a.b", b"_INBOX.\xff", b""):
                named = subject.replace("%s", job_id).encode("latin-1")
                send(MALFORMED[kind] % (named, reply))
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    assert _ask(stack, "infer.queue")
    assert stack.http.get(f"/status/{job_id}").status_code in (200, 404)
    for path in ("/queue", "/inferers", "/dead", "/v1/models", "/readyz"):
        assert stack.http.get(path).status_code == 200, path
    eventually(lambda: _is_empty(stack), "what cannot be read leaves the queue")
    stack.start_gateway().wait_for("gateway_ready")
    for process in (*stack.gateways, *stack.inferers):
        assert process.popen.poll() is None
        assert not process.events("broker_disconnected")
        assert "Traceback" not in process.output()


def _answer(stack: Stack, **body: Any) -> dict[str, Any]:
    """What a client gets that submits a job and waits for its end."""
    answer = httpx2.post(
        f"{stack.url}/jobs",
        json=body,
        headers={"prefer": f"wait={PATIENCE_S:.0f}"},
        timeout=2 * PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _ask(stack: Stack, subject: str) -> bytes:
    """The answer to a request over NATS."""

    async def ask() -> bytes:
        async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
            return (await broker.nc.request(subject, timeout=PATIENCE_S)).data

    return asyncio.run(ask())


def _is_empty(stack: Stack) -> bool:
    queue = _queue(stack)
    return bool(queue["waiting"] + queue["in_flight"] == 0)


def _queue(stack: Stack) -> dict[str, Any]:
    (found,) = stack.http.get("/queue").json()["models"]
    assert isinstance(found, dict)
    return found


@contextmanager
def _raw(port: int) -> Iterator[Any]:
    """Sends bytes to the broker as they are, and waits until it has taken them."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        lines = connection.makefile("rb")
        lines.readline()
        connection.sendall(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')

        def send(message: bytes) -> None:
            connection.sendall(message + b"PING\r\n")
            while (line := lines.readline()) != b"PONG\r\n":
                assert line, "the broker has hung up"
                assert not line.startswith(b"-ERR"), line

        yield send
