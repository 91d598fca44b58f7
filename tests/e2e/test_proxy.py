"""A proxy in the environment never stands between Sluice and this machine."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_S, ROOT, Stack, clean_environment, free_port, scripts
from tests.support.up import Up

NAMES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")

PROXIES = {
    "dead port": "http://127.0.0.1:9",
    "socks": "socks5://127.0.0.1:9",
    "unknown scheme": "gopher://127.0.0.1:9",
    "no URL": "http://[::1",
}


def every_variable(proxy: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, proxy)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Replies every request itself, as a company's proxy does that refuses a host."""

    def do_GET(self) -> None:
        body = b"<html>blocked</html>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    """A proxy that refuses everything."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def sluice(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(scripts() / "sluice"), *command],
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_up_autoscales_behind_a_proxy(tmp_path: Path, tiny_model: Path, ups: list[Up]) -> None:
    """`sluice up` becomes ready, and its autoscaler sees the job that waits for an inferer."""
    environment = every_variable(PROXIES["dead port"])
    up = Up(tmp_path / "data", tiny_model, "--min", "0", "--max", "1", **environment)
    ups.append(up)
    up.wait_until_ready()
    job_id = up.submit(prompt="hi", max_tokens=2)
    assert up.wait_for_state(job_id, "SUCCESS", "FAILURE")["state"] == "SUCCESS"


@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)
def test_commands_reach_this_machine_whatever_the_proxy(shared_stack: Stack, proxy: str) -> None:
    """127.0.0.1 and localhost are asked directly, also by `doctor`, whose verdict is all well."""
    environment = every_variable(proxy)
    for url in (shared_stack.url, shared_stack.url.replace("127.0.0.1", "localhost")):
        listed = sluice("queue", "--json", "--url", url, **environment)
        assert listed.returncode == 0, listed.stderr
        assert json.loads(listed.stdout)["models"]
    asked = sluice("ask", "hi", "--max-tokens", "2", "--url", shared_stack.url, **environment)
    assert asked.returncode == 0, asked.stderr
    options = ("--url", shared_stack.url, "--nats-url", shared_stack.nats.url)
    examined = sluice("doctor", *options, **environment)
    assert "ready at" in examined.stdout, examined.stdout


def test_another_host_is_asked_through_the_proxy(proxy: str) -> None:
    """The environment's rules hold for it, NO_PROXY too; a failure names the proxy."""
    port = free_port()
    url = f"http://gateway.invalid:{port}"
    refused = sluice("queue", "--url", url, http_proxy=proxy)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1
    assert proxy in refused.stderr
    assert "403" in refused.stderr
    unreachable = sluice("queue", "--url", url, http_proxy="http://127.0.0.1:9")
    assert unreachable.returncode == 3
    assert "http://127.0.0.1:9" in unreachable.stderr
    around = sluice("queue", "--url", url, http_proxy=proxy, NO_PROXY="gateway.invalid")
    assert around.returncode == 3
    assert proxy not in around.stderr


@pytest.mark.parametrize("kind", ["unknown scheme", "no URL"])
def test_a_proxy_that_cannot_be_used_is_an_error(kind: str) -> None:
    """One line that names it and says what to do, for a host that needs it."""
    ended = sluice("queue", "--url", "http://gateway.invalid:5001", http_proxy=PROXIES[kind])
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert PROXIES[kind] in ended.stderr
    assert "NO_PROXY" in ended.stderr
    examined = sluice("doctor", "--url", "http://gateway.invalid:5001", http_proxy=PROXIES[kind])
    assert examined.returncode == 2
    assert PROXIES[kind] in examined.stderr


@pytest.mark.timeout(330)
def test_the_demo_runs_behind_a_proxy() -> None:
    """`make demo` with a proxy in the environment: both prompts are answered."""
    ended = subprocess.run(
        [sys.executable, "-m", "cli.demo"],
        cwd=ROOT,
        env={**clean_environment(), **every_variable(PROXIES["dead port"])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
