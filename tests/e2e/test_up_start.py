"""`sluice up` that cannot start, or starts where an earlier one was killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.support.disk import small_disk
from tests.support.processes import (
    PATIENCE_S,
    ROOT,
    clean_environment,
    eventually,
    free_port,
    scripts,
)
from tests.support.up import Up


def refused(
    *options: str, program: tuple[str, ...] = (), status: int = 2, **environment: str
) -> str:
    """The last line of a `sluice up` that must end by itself, with this exit status."""
    command = program or (str(scripts() / "sluice"), "up", "--port", "0", "--nats-port", "0")
    ended = subprocess.run(
        [*command, *options],
        env={**clean_environment(), "INFERER_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    return ended.stderr.splitlines()[-1]


def test_the_gateway_and_the_broker_do_not_share_a_port(tmp_path: Path) -> None:
    """Also not one that was free when each asked for it."""
    port = str(free_port())
    line = refused("--port", port, "--nats-port", port, "--data", str(tmp_path / "data"))
    assert "choose another with --nats-port" in line


def up_with_broker(tmp_path: Path, content: bytes, mode: int) -> tuple[str, Path]:
    """The last line of a `sluice up` whose nats-server is this file, and the file."""
    broker = tmp_path / "nats-server"
    broker.write_bytes(content)
    broker.chmod(mode)
    # `sluice up` takes the one beside its python.
    starter = (
        "import sysconfig; real = sysconfig.get_path; "
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r} if name == 'scripts' else real(name);"
        "from cli.main import run; run()"
    )
    options = ("up", "--port", "0", "--nats-port", "0", "--data", str(tmp_path / "data"))
    line = refused(*options, program=(sys.executable, "-c", starter), PYTHONPATH=str(ROOT))
    return line, broker


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"#!/no/such/interpreter\n", 0o755, "interpreter"),
        (b"#!/bin/sh\n", 0o644, "Permission denied"),
        (b"\x7fELF" + bytes(100), 0o755, "Exec format error"),
        (b"#!/bin/sh\necho cannot open libbroken.so >&2\nexit 127\n", 0o755, "libbroken.so"),
        (b"#!/bin/sh\nexit 0\n", 0o755, "exit status 0"),
    ],
    ids=["no interpreter", "not executable", "wrong architecture", "missing library", "ends"],
)
def test_a_broker_that_cannot_run_ends_the_start_with_a_reason(
    tmp_path: Path, content: bytes, mode: int, why: str
) -> None:
    """Exit status 2, and a last line with the reason: the system's, or the file's own words."""
    line, broker = up_with_broker(tmp_path, content, mode)
    assert why in line
    assert "nats" in line
    if why in ("interpreter", "Permission denied", "Exec format error"):
        assert str(broker) in line


def test_the_last_lines_of_a_broker_are_shown(tmp_path: Path, tiny_model: Path) -> None:
    """A broker that ends at every start: its own reason is in the last line."""
    line = refused("--data", str(tmp_path / "data"), "--model", str(tiny_model), SLUICE_STORE="x")
    assert "nats" in line
    assert "max_file" in line or "'x'" in line or "SLUICE_STORE" in line


@pytest.mark.parametrize("kind", ["a file", "nats a file", "too long", "read-only", "no space"])
def test_a_data_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    """One line that names it, and no process is started."""
    data = tmp_path / "data"
    with folder_for(tmp_path, kind) as folder:
        if kind == "a file":
            data.write_text("")
        elif kind == "nats a file":
            data.mkdir()
            (data / "nats").write_text("")
        elif kind == "too long":
            data = tmp_path / ("x" * 300)
        else:
            data = folder / "data"
        line = refused("--data", str(data), "--model", str(tiny_model))
    assert f"cannot use the folder {data}" in line


@contextmanager
def folder_for(tmp_path: Path, kind: str) -> Iterator[Path]:
    """A folder on a disk of its own that is as ``kind`` says."""
    if kind not in ("read-only", "no space"):
        yield tmp_path
        return
    with small_disk(tmp_path / "disk") as disk:
        if kind == "no space":
            (disk.folder / "data").mkdir()
            disk.fill()
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
        yield disk.folder


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing.gguf", "does not exist"), ("text.gguf", "GGUF"), ("cut.gguf", "is damaged")],
)
def test_a_model_that_cannot_be_used_is_refused(
    tmp_path: Path, tiny_model: Path, name: str, why: str
) -> None:
    """The last line is the reason, with the file's name."""
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(tiny_model.read_bytes()[:10_000])
    line = refused("--data", str(tmp_path / "data"), "--model", str(tmp_path / name))
    assert why in line
    assert name in line
    assert not (tmp_path / "data").exists(), "checked before anything starts"


def test_too_low_a_limit_of_open_files_is_named(tmp_path: Path, tiny_model: Path) -> None:
    """A limit on open files that is too low is named, instead of an endless start."""
    limited = f"ulimit -n 12; exec {scripts() / 'sluice'} up --port 0 --nats-port 0 "
    line = refused(
        program=("sh", "-c", f"{limited} --data {tmp_path / 'data'} --model {tiny_model}")
    )
    assert "open files" in line


def test_a_folder_is_free_after_a_kill_although_its_parts_are_frozen(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """kill -9 of `sluice up` while its broker, gateway and inferer hang: the next one ends them
    before it starts, so that there are never two brokers on a folder, and serves the old queue."""
    data = tmp_path / "data"
    first = Up(data, tiny_model)
    ups.append(first)
    first.wait_until_ready()
    job_id = first.submit(prompt="hi", max_tokens=2)
    first.wait_for_state(job_id, "SUCCESS")
    old = [first.pid_of(name) for name in ("nats", "gateway", "inferer-1")]
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    first.popen.kill()
    first.popen.wait(PATIENCE_S)
    try:
        second = Up(data, tiny_model)
        ups.append(second)
        eventually(lambda: second.events("left_over_processes_found"), "it says so")
        second.wait_until_ready()
        assert not [pid for pid in old if is_running(pid)]
        assert set(second.events("left_over_processes_found")[0]["pids"]) == set(old)
        assert second.http.get(f"/status/{job_id}").json()["state"] == "SUCCESS"
        assert len(second.http.get("/inferers").json()["inferers"]) == 1
    finally:
        for pid in old:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_stack_that_hangs_keeps_its_folder(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """A `sluice up` that is frozen with its parts is not taken for a dead one: the second is
    refused, names the process, and touches nothing."""
    data = tmp_path / "data"
    first = Up(data, tiny_model)
    ups.append(first)
    first.wait_until_ready()
    frozen = [first.popen.pid, *(first.pid_of(name) for name in ("nats", "gateway"))]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        line = refused("--data", str(data), "--model", str(tiny_model))
        assert f"another `sluice up` (process {first.popen.pid}) runs" in line
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert first.http.get("/healthz").status_code == 200


def test_a_log_that_nobody_reads_does_not_stop_the_stack(tmp_path: Path, tiny_model: Path) -> None:
    """stderr that blocks, stdout that is closed: it serves, and ends with status 0."""
    reader, writer = os.pipe()
    out, gone = os.pipe()
    os.close(out)
    port = free_port()
    up = subprocess.Popen(
        [
            *(str(scripts() / "sluice"), "up", "--port", str(port), "--nats-port", "0"),
            *("--data", str(tmp_path / "data"), "--model", str(tiny_model)),
        ],
        env={**clean_environment(), "INFERER_THREADS": "1"},
        stdout=gone,
        stderr=writer,
    )
    os.close(gone)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
            eventually(lambda: is_served(http), "it serves")
            for _ in range(400):
                assert http.post("/jobs", json={"prompt": "hi", "max_tokens": 1}).status_code == 202
            job = http.post(
                "/jobs", json={"prompt": "hi", "max_tokens": 1}, headers={"prefer": "wait=55"}
            )
            assert job.json()["state"] == "SUCCESS"
        up.terminate()
        assert up.wait(40) == 0
    finally:
        if up.poll() is None:
            up.terminate()
            up.wait(60)
        os.close(reader)
        os.close(writer)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_served(http: httpx2.Client) -> bool:
    try:
        return any(queue["inferers"] for queue in http.get("/queue").json().get("models", []))
    except (httpx2.TransportError, ValueError):
        return False
