"""A job that waits for another attempt: a command on a terminal says why nothing comes."""

import signal
from pathlib import Path

import pytest

from tests.support.processes import Stack, eventually
from tests.support.terminal import Terminal, terminal

LONG = {"max_tokens": 4000, "ignore_eos": True}


def wait_until_said(shown: Terminal, text: str) -> None:
    eventually(lambda: text in _said(shown), f"{text!r} in\n{shown.output[-3000:]}")


def _end(shown: Terminal) -> int:
    """The exit status. A terminal that nobody reads would hold up the command."""
    eventually(lambda: _said(shown) and shown.process.poll() is not None, "it has ended")
    return shown.process.wait()


def _said(shown: Terminal) -> str:
    """Without the line breaks of the terminal."""
    return " ".join(shown.output.split())


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_an_inferer_that_was_killed(stack: Stack, tiny_model: Path, flags: tuple[str, ...]) -> None:
    """The command says what the job waits for, and when the next attempt starts."""
    job_id = stack.submit(prompt="go on", **LONG)
    stack.wait_for_state(job_id, "STARTED")
    with terminal("follow", job_id, "--url", stack.url, *flags) as shown:
        stack.inferers[0].popen.send_signal(signal.SIGKILL)
        wait_until_said(shown, "the inferer inferer-0 is gone; the job waits for another attempt")
        stack.start_inferer(tiny_model)
        wait_until_said(shown, "attempt 2 has started")
        assert _end(shown) == 0
        assert _said(shown).count("is gone") == 1


def test_an_inferer_that_shuts_down(stack: Stack, tiny_model: Path) -> None:
    """The job waits for another one."""
    job_id = stack.submit(prompt="go on", n=8, **LONG)
    stack.wait_for_state(job_id, "STARTED")
    with terminal("follow", job_id, "--url", stack.url) as shown:
        stack.inferers[0].terminate()
        wait_until_said(shown, "the inferer inferer-0 shuts down; the job waits for another one")
        stack.http.delete(f"/jobs/{job_id}")
        assert _end(shown) == 1
