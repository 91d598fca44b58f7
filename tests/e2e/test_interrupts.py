"""Commands that are interrupted: nothing runs for nobody, whatever the moment."""

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.support.processes import PATIENCE_S, Stack, clean_environment, eventually, scripts

UNREACHABLE, INTERRUPTED = 3, 130


class SlowAnswers:
    """A way to a gateway on which requests go through at once, answers when they are released."""

    def __init__(self, port: int) -> None:
        self._gateway = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),  # either of them has hung up
            client,
            socket.create_connection(self._gateway) as gateway,
        ):
            while True:
                sources = [client, gateway] if self.released.is_set() else [client]
                readable, _, _ = select.select(sources, [], [], 0.05)
                for source in readable:
                    data = source.recv(65536)
                    if not data:
                        return
                    (gateway if source is client else client).sendall(data)


@pytest.fixture
def slow(stack: Stack) -> Iterator[SlowAnswers]:
    answers = SlowAnswers(int(stack.url.rpartition(":")[2]))
    yield answers
    answers.close()


def start(url: str, *arguments: str, stdin: bytes = b"") -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [scripts() / "sluice", *arguments, "--url", url],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    process.stdin = None  # `communicate` would close it once more
    return process


def accepted(stack: Stack) -> str:
    events = eventually(
        lambda: stack.gateways[0].events("request_accepted") or None, "it is accepted"
    )
    return str(events[0]["job_id"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("prompt", ["go on", "-"], ids=["argument", "stdin"])
def test_ask_that_is_interrupted_while_it_submits_cancels_its_job(
    stack: Stack, slow: SlowAnswers, how: signal.Signals, prompt: str
) -> None:
    """The job was accepted, but the command does not know its id yet: it is cancelled all the
    same, as soon as it does."""
    asking = start(slow.url, "ask", prompt, "--max-tokens", "4000", stdin=b"go on")
    job_id = accepted(stack)
    asking.send_signal(how)
    slow.released.set()
    _, printed = asking.communicate(timeout=PATIENCE_S)
    assert asking.returncode == INTERRUPTED, printed
    assert printed.decode().split() == ["cancelled", job_id]
    assert stack.wait_for_end(job_id)["state"] == "REVOKED"


def test_a_second_interrupt_ends_it_at_once(stack: Stack, slow: SlowAnswers) -> None:
    """Also while the gateway does not answer; it says what is not known."""
    asking = start(slow.url, "ask", "go on", "--max-tokens", "5")
    accepted(stack)
    for _ in range(2):
        asking.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            asking.wait(0.5)
    _, printed = asking.communicate(timeout=PATIENCE_S)
    assert (asking.returncode, b"the job may run" in printed) == (INTERRUPTED, True), printed
    assert b"Traceback" not in printed


@pytest.mark.parametrize("flags", [(), ("--wait",)], ids=["submit", "submit --wait"])
def test_submit_that_is_interrupted_while_it_submits_prints_its_id(
    stack: Stack, slow: SlowAnswers, flags: tuple[str, ...]
) -> None:
    """Its job goes on, so it says which one that is."""
    submitting = start(slow.url, "submit", "go on", "--max-tokens", "5", *flags)
    job_id = accepted(stack)
    submitting.send_signal(signal.SIGINT)
    slow.released.set()
    _, printed = submitting.communicate(timeout=PATIENCE_S)
    assert submitting.returncode == INTERRUPTED, printed
    assert printed.decode() == f"the job continues: sluice status {job_id}\n"
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


def test_a_reader_that_goes_away_cancels_the_job(stack: Stack) -> None:
    """A closed pipe: the job is cancelled, and nothing is complained about at the end."""
    asking = start(stack.url, "ask", "go on", "--max-tokens", "4000")
    assert asking.stdout is not None
    assert asking.stderr is not None
    assert asking.stdout.read(1)
    asking.stdout.close()
    printed = asking.stderr.read().decode()
    assert asking.wait(PATIENCE_S) == INTERRUPTED, printed
    word, job_id = printed.split()
    assert word == "cancelled"
    assert stack.wait_for_end(job_id)["state"] == "REVOKED"


def test_ask_says_that_the_connection_was_lost(stack: Stack) -> None:
    """At once on a terminal; the message at the end has a line of its own below the answer."""
    ours, theirs = pty.openpty()
    asking = subprocess.Popen(
        [scripts() / "sluice", "ask", "go on", "--max-tokens", "4000", "--url", stack.url],
        env={**clean_environment(), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""

    def says(text: bytes) -> bool:
        nonlocal shown
        with contextlib.suppress(OSError):  # nothing more now
            shown += os.read(ours, 65536)
        return text in shown

    try:
        assert asking.stdout is not None
        assert asking.stdout.read(1)
        stack.gateways[0].kill()
        eventually(lambda: says(b"the connection was lost; trying again"), "it says so")
        assert asking.poll() is None
        answer = asking.stdout.read()
        assert asking.wait(PATIENCE_S) == UNREACHABLE
        eventually(lambda: says(b"sluice: the connection to"), "it gives up")
        assert answer.endswith(b"\n")
    finally:
        asking.kill()
        os.close(ours)
