"""A log that cannot be written: the work goes on, and a process still stops on SIGTERM."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.support.processes import (
    PATIENCE_S,
    ROOT,
    NatsServer,
    clean_environment,
    eventually,
    free_port,
)

KINDS = ("reader gone", "disk full", "nobody reads", "closed")


@contextmanager
def unwritable(kind: str) -> Iterator[int | None]:
    """A descriptor that takes nothing, or 4096 bytes and then blocks; None for none at all."""
    if kind == "closed":
        yield None
        return
    if kind == "disk full":
        descriptor, reader = os.open("/dev/full", os.O_WRONLY), None
    else:
        reader, descriptor = os.pipe()
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 4096)
        if kind == "reader gone":
            os.close(reader)
            reader = None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        if reader is not None:
            os.close(reader)


def start(service: str, output: int | None, **environment: str) -> subprocess.Popen[bytes]:
    """A service with stdout and stderr there."""
    command = [sys.executable, "-m", f"services.{service}"]
    if output is None:
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**clean_environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def serves(http: httpx2.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def accepted(http: httpx2.Client, body: dict[str, object]) -> str | None:
    answer = http.post("/jobs", json=body)
    return str(answer.json()["id"]) if answer.status_code == 202 else None


def succeeded(http: httpx2.Client, job_id: str) -> bool:
    return bool(http.get(f"/status/{job_id}").json().get("state") == "SUCCESS")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_jobs_are_done_although_the_log_is_blocked(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    """`POST /jobs` says 202, every job ends, a restart of the broker is survived, and SIGTERM ends
    gateway and inferer with status 0; all without a line of log."""
    with NatsServer(tmp_path / "nats") as nats, unwritable(kind) as output:
        port = str(free_port())
        services = [
            start("gateway", output, NATS_URL=nats.url, GATEWAY_PORT=port, GATEWAY_MODELS="tiny"),
            start("inferer", output, NATS_URL=nats.url, INFERER_MODEL=str(tiny_model)),
        ]
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
                eventually(lambda: serves(http), "the gateway serves")
                body = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
                for _ in range(20):
                    assert http.post("/jobs", json=body).status_code == 202
                job_id = http.post("/jobs", json=body).json()["id"]
                eventually(lambda: succeeded(http, job_id), "a job is done", 120)
                nats.process.kill()
                eventually(lambda: not serves(http), "the gateway has noticed")
                nats.start()
                eventually(lambda: serves(http), "the gateway serves again")
                job_id = eventually(lambda: accepted(http, body), "a job is accepted")
                eventually(lambda: succeeded(http, job_id), "a job is done", 120)
            for service in services:
                service.send_signal(signal.SIGTERM)
            assert [service.wait(30) for service in services] == [0, 0]
        finally:
            for service in services:
                service.kill()
                service.wait()


def test_a_reader_that_pauses_gets_every_line(tmp_path: Path) -> None:
    """A gateway's log waits for its reader, in order, also the lines of its end."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with NatsServer(tmp_path / "nats") as nats:
        port = str(free_port())
        gateway = start("gateway", writer, NATS_URL=nats.url, GATEWAY_PORT=port, GATEWAY_MODELS="m")
        os.close(writer)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
                eventually(lambda: serves(http), "the gateway serves")
                body = {"model": "m", "prompt": "hi"}
                ids = [http.post("/jobs", json=body).json()["id"] for _ in range(60)]
            gateway.send_signal(signal.SIGTERM)
            with os.fdopen(reader) as log:
                lines = [json.loads(line) for line in log]
            assert gateway.wait(30) == 0
        finally:
            gateway.kill()
            gateway.wait()
    events = [line["event"] for line in lines]
    assert events[-1] == "gateway_stopped"
    assert "log_lines_dropped" not in events
    accepted = [line["job_id"] for line in lines if line["event"] == "request_accepted"]
    assert accepted == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_setting_ends_with_its_status(kind: str) -> None:
    """Whatever becomes of the sentence, a supervisor learns that a restart is of no use."""
    with unwritable(kind) as output:
        service = start("gateway", output, GATEWAY_PORT="abc")
        assert service.wait(PATIENCE_S) == 2
