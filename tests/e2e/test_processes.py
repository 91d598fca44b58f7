"""Starting and stopping of the services: wrong settings, signals, files that are not models."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import (
    ROOT,
    NatsServer,
    Process,
    Stack,
    clean_environment,
    eventually,
    free_port,
)


@pytest.mark.parametrize(
    ("service", "variable", "value", "named"),
    [
        ("inferer", "INFERER_THREADS", "x", ("INFERER_THREADS", "'x'", "int")),
        ("inferer", "INFERER_THREADS", "-1", ("INFERER_THREADS", ">= 0")),
        ("inferer", "INFERER_TREADS", "2", ("INFERER_TREADS", "did you mean INFERER_THREADS?")),
        ("inferer", "INFERER_CONCURRENCY", "0", ("INFERER_CONCURRENCY", "1 to 64")),
        ("inferer", "INFERER_GRACE_S", "nan", ("INFERER_GRACE_S",)),
        ("inferer", "INFERER_ALIAS", "tiny ", ("INFERER_ALIAS", "white space")),
        ("inferer", "INFERER_ID", "a b", ("INFERER_ID",)),
        ("inferer", "INFERER_ID", "*", ("INFERER_ID",)),
        ("inferer", "NATS_URL", "nats://127.0.0.1:port", ("NATS_URL",)),
        ("gateway", "GATEWAY_PORT", "abc", ("GATEWAY_PORT", "'abc'", "int")),
        ("gateway", "GATEWAY_PORT", "70000", ("GATEWAY_PORT", "<= 65535")),
        ("gateway", "GATEWAY_HOST", "no.such.host.invalid", ("GATEWAY_HOST",)),
        ("gateway", "GATEWAY_MODELS", "bad\tname", ("GATEWAY_MODELS", "control")),
        ("gateway", "GATEWAY_PROT", "5001", ("GATEWAY_PROT", "did you mean GATEWAY_PORT?")),
        ("gateway", "NATS_URL", "nats://127.0.0.1:port", ("NATS_URL",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_is_one_line_and_its_status(
    nats_server: NatsServer,
    tiny_model: Path,
    service: str,
    variable: str,
    value: str,
    named: tuple[str, ...],
) -> None:
    """Exit status 2 and one line with the variable's name and what is wrong with it."""
    environment = {"NATS_URL": nats_server.url}
    if service == "inferer":
        environment["INFERER_MODEL"] = str(tiny_model)
    _assert_refuses_to_start(service, {**environment, variable: value}, *named)


def test_a_port_in_use_is_one_line_and_its_status() -> None:
    """The gateway says which, and does not try for ever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _assert_refuses_to_start(
            "gateway", {"GATEWAY_PORT": port}, f"GATEWAY_PORT={port}", "in use"
        )


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("text", "is not a GGUF file"),
        ("empty", "is not a GGUF file"),
        ("magic only", "is damaged: it ends in the middle of its header"),
        ("truncated header", "is damaged: it ends in the middle of its header"),
        ("truncated", "is damaged: it ends before its last tensor"),
        ("unknown architecture", "cannot load"),
    ],
)
def test_a_model_file_that_is_not_one_is_one_line_and_its_status(
    tmp_path: Path, tiny_model: Path, kind: str, why: str
) -> None:
    """Exit status 2 and one line with the path and what is wrong with the file."""
    path = tmp_path / "model.gguf"
    whole = tiny_model.read_bytes()
    contents = {
        "text": b"not a model",
        "empty": b"",
        "magic only": whole[:4],
        "truncated header": whole[:10_000],
        "truncated": whole[: len(whole) * 9 // 10],
        "unknown architecture": whole.replace(b"llama", b"other"),
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])
    environment = {"INFERER_MODEL": str(path), "NATS_URL": f"nats://127.0.0.1:{free_port()}"}
    _assert_refuses_to_start("inferer", environment, str(path), why)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"INFERER_GPU_LAYERS": "5"}, ["INFERER_GPU_LAYERS=5", "no GPU", "docs/how-to/gpu.md"]),
        ({"INFERER_MAIN_GPU": "1"}, ["INFERER_MAIN_GPU=1", "no GPU"]),
        ({"INFERER_SPLIT_MODE": "none"}, ["INFERER_SPLIT_MODE=none", "no GPU"]),
        (
            {"INFERER_KV_TYPE": "q8_0"},
            ["INFERER_KV_TYPE=q8_0", "n_embd_head_k=8", "set INFERER_KV_TYPE=f16"],
        ),
        (
            {"INFERER_KV_TYPE": "q8_0", "INFERER_FLASH_ATTENTION": "off"},
            ["INFERER_KV_TYPE=q8_0 needs flash attention"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_here_is_one_line_and_its_status(
    tiny_model: Path, settings: dict[str, str], why: list[str]
) -> None:
    """No GPU is visible, and the model's heads have 8 numbers, where a block has 32."""
    environment = {
        "INFERER_MODEL": str(tiny_model),
        "NATS_URL": f"nats://127.0.0.1:{free_port()}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    _assert_refuses_to_start("inferer", {**environment, **settings}, *why)


def test_an_inferer_logs_what_it_is_when_it_is_ready(stack: Stack) -> None:
    """First `model_loaded`, then one line with what it will work with; every line is JSON."""
    stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))
    inferer = stack.inferers[0]
    (ready,) = inferer.events("inferer_ready")
    assert (ready["model"], ready["concurrency"], ready["threads"]) == ("tiny", 1, 1)
    assert ready["gpu_layers"] >= 0
    assert inferer.terminate() == 0
    assert stack.gateways[0].terminate() == 0
    for process in (inferer, stack.gateways[0]):
        lines = [json.loads(line) for line in process.output().splitlines()]
        assert all(re.fullmatch("[a-z_]+", line["event"]) for line in lines)
        assert all(line["timestamp"] and line["level"] and line["service"] for line in lines)
    events = [json.loads(line)["event"] for line in inferer.output().splitlines()]
    assert events.index("model_loaded") < events.index("inferer_ready")
    assert events[-1] == "inferer_stopped"


def test_an_idle_inferer_stops_at_once(stack: Stack) -> None:
    """SIGTERM: exit status 0, and the gateway no longer counts it."""
    began = time.monotonic()
    assert stack.inferers[0].terminate() == 0
    assert time.monotonic() - began < 8, "it waited for its grace"
    assert stack.inferers[0].events("inferer_stopped")
    eventually(lambda: _live_inferers(stack) == 0, "the gateway has noticed")


def test_a_busy_inferer_finishes_within_its_grace(stack: Stack) -> None:
    """SIGTERM in the middle of a job that ends in time: the answer is stored first."""
    job_id = stack.submit(prompt="go on", max_tokens=500)
    stack.wait_for_state(job_id, "STARTED")
    assert stack.inferers[0].terminate() == 0
    status = stack.status(job_id)
    assert (status["state"], status["attempts"]) == ("SUCCESS", 1)


def test_a_busy_inferer_without_grace_requeues_its_job(tmp_path: Path, tiny_model: Path) -> None:
    """Another one completes it, at once, and it does not count as a second attempt."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        first = stack.start_inferer(tiny_model, INFERER_GRACE_S="0.2")
        stack.wait_until_served("tiny")
        job_id = stack.submit(prompt="go on", max_tokens=1500, seed=5)
        stack.wait_for_state(job_id, "STARTED")
        assert first.terminate() == 0
        assert first.events("job_requeued")
        assert "Traceback" not in first.output()
        requeued = stack.status(job_id)
        assert (requeued["state"], requeued["attempts"]) == ("PENDING", 0)

        second = stack.start_inferer(tiny_model)
        ended = stack.wait_for_end(job_id)
        assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
        assert ended["inferer"] == "inferer-1"
        assert second.wait_for("job_finished")["job_id"] == job_id  # logged after the result


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_processes_stop_while_the_broker_is_away(
    tmp_path: Path, tiny_model: Path, busy: bool
) -> None:
    """Gateway and inferer exit 0 in bounded time; what ran is repeated when all is back."""
    with Stack(tmp_path) as stack:
        gateway = stack.start_gateway()
        inferer = stack.start_inferer(tiny_model, INFERER_GRACE_S="0.2")
        stack.wait_until_served("tiny")
        job_id = stack.submit(prompt="go on", max_tokens=2000) if busy else None
        if job_id:
            stack.wait_for_state(job_id, "STARTED")
        stack.nats.process.kill()
        inferer.wait_for("broker_disconnected")
        gateway.wait_for("broker_disconnected")
        began = time.monotonic()
        assert inferer.terminate() == 0
        assert gateway.terminate() == 0
        assert time.monotonic() - began < 30
        for process in (inferer, gateway):
            assert "Traceback" not in process.output()

        if job_id:
            stack.nats.start()
            stack.start_gateway(GATEWAY_PORT=stack.url.rpartition(":")[2])
            stack.start_inferer(tiny_model)
            stack.gateways.remove(gateway)
            stack.inferers.remove(inferer)
            stack.wait_until_served("tiny")
            assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


@pytest.mark.parametrize("service", ["gateway", "inferer"])
def test_processes_stop_before_there_ever_was_a_broker(
    tmp_path: Path, tiny_model: Path, service: str
) -> None:
    """SIGTERM of one that still waits for its first connection: exit status 0."""
    nowhere = f"nats://127.0.0.1:{free_port()}"
    settings = {"INFERER_MODEL": str(tiny_model), "GATEWAY_PORT": str(free_port())}
    own = {name: value for name, value in settings.items() if name.startswith(service.upper())}
    process = Process(
        [sys.executable, "-m", f"services.{service}"],
        tmp_path / "log",
        {"NATS_URL": nowhere, **own},
    )
    try:
        process.wait_for("broker_error")
        assert process.terminate() == 0
    finally:
        process.end()
    assert "Traceback" not in process.output()


def test_a_base_model_completes_and_refuses_chats(tmp_path: Path, tiny_base_model: Path) -> None:
    """Without a chat template chats are refused with the reason, and prompts are served."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_base_model)
        stack.wait_until_served("tiny-base")
        assert stack.inferers[0].wait_for("inferer_ready")["tasks"] == ["complete"]
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        refused = stack.http.post("/jobs", json=chat)
        assert refused.status_code == 400
        assert "chat template" in refused.json()["detail"]
        refused = stack.http.post("/v1/chat/completions", json=chat)
        assert refused.status_code == 400
        assert "chat template" in refused.json()["error"]["message"]
        assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"


def _assert_refuses_to_start(service: str, environment: dict[str, str], *named: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", f"services.{service}"],
        cwd=ROOT,
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{service}: ")
    for text in named:
        assert text in line


def _live_inferers(stack: Stack) -> int:
    (queue,) = stack.http.get("/queue").json()["models"]
    return int(queue["inferers"])
