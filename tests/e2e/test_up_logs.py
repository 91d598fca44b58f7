"""What `sluice up` prints: short lines at a terminal, JSON for programs, either on request."""

import json
import os
import re
import signal
from pathlib import Path

from tests.support.processes import eventually
from tests.support.terminal import ESCAPE, terminal
from tests.support.up import Up


def test_a_terminal_shows_what_starts_where_it_listens_and_what_died(
    tmp_path: Path, tiny_model: Path
) -> None:
    """No JSON, and nothing of the broker's banner."""
    options = ("--data", str(tmp_path), "--model", str(tiny_model), "--port", "0")
    with terminal("up", *options, "--nats-port", "0") as up:

        def text() -> str:
            return ESCAPE.sub("", up.output).replace("\r", "")

        eventually(lambda: "ready http://" in text(), "it is ready")
        lines = text().splitlines()
        for part in ("nats", "gateway", "inferer-1"):
            assert any(re.fullmatch(rf"{part}: started \(process \d+\)", line) for line in lines)
        assert not any("{" in line or "[INF]" in line for line in lines), text()
        pid = re.search(r"inferer-1: started \(process (\d+)\)", text())
        assert pid is not None
        os.kill(int(pid[1]), signal.SIGKILL)
        died = "inferer-1: ended with signal 9 (SIGKILL); restarting in "
        eventually(lambda: died in text(), died)
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(30) == 0


def test_json_on_request_at_a_terminal(tmp_path: Path, tiny_model: Path) -> None:
    options = ("--data", str(tmp_path), "--model", str(tiny_model), "--port", "0")
    with terminal("up", *options, "--nats-port", "0", "--log-format", "json") as up:
        eventually(lambda: "ready http://" in up.output, "it is ready")
        started = [line for line in up.output.splitlines() if '"child_started"' in line]
        assert {json.loads(line)["child"] for line in started} == {"nats", "gateway", "inferer-1"}
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(30) == 0


def test_plain_on_request_elsewhere(tmp_path: Path, tiny_model: Path) -> None:
    up = Up(tmp_path / "data", tiny_model, "--log-format", "plain")
    try:
        up.wait_until_ready()
        assert re.search(r"^gateway: started \(process \d+\)$", up.stderr, re.MULTILINE)
        assert "{" not in up.stderr
        assert up.stop() == 0
    finally:
        up.end()
