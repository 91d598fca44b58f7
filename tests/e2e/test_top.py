"""`sluice top`: a live view for a terminal, one report where there is no terminal."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import (
    PATIENCE_S,
    Stack,
    clean_environment,
    eventually,
    free_port,
    scripts,
)
from tests.support.terminal import ESCAPE, terminal


def test_the_live_view_follows_jobs_and_inferers(stack: Stack, tiny_model: Path) -> None:
    """Queue, inferers and jobs as they change; an outage of the gateway is a line that goes again;
    Ctrl-C ends it with status 0 and gives the terminal back."""
    # With room for jobs that are long enough to be seen.
    stack.inferers.pop().terminate()
    stack.start_inferer(tiny_model, INFERER_N_CTX="8192")
    stack.wait_until_served("tiny")
    with terminal("top", "--url", stack.url) as top:
        top.shows("no running jobs")
        for text in ("waiting by priority", "tiny", "inferer-0", "idle", "tokens/s"):
            assert text in top.screen
        body = {"prompt": "tell me", "max_tokens": 8000, "seed": 1}  # does not end by itself
        jobs = [stack.submit(**body)]
        stack.wait_for_state(jobs[0], "STARTED")  # or that of a higher class would go first
        jobs += [stack.submit(**body, priority=p) for p in ("high", "low")]
        for text in ("1 high, 1 low", jobs[0], "/8000", "busy"):
            top.shows(text)

        port = stack.url.rpartition(":")[2]
        stack.gateways.pop().kill()
        top.shows("no gateway at")
        assert "inferer-0" in top.screen
        stack.start_gateway(GATEWAY_PORT=port)
        top.hides("no gateway at")
        stack.wait_until_served("tiny")
        for job_id in reversed(jobs):
            stack.http.delete(f"/jobs/{job_id}")
        top.shows("no running jobs")

        top.type(b"\x03")
        assert top.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in top.output
        assert top.output.index("\x1b[?1049h") < top.output.rindex("\x1b[?1049l")
        assert top.output.rindex("\x1b[?25l") < top.output.rindex("\x1b[?25h")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_view_leaves_the_terminal_as_it_was(
    shared_stack: Stack, how: signal.Signals
) -> None:
    """It gives the terminal back too."""
    with terminal("top", "--url", shared_stack.url) as top:
        top.shows("inferer-0")
        top.process.send_signal(how)
        assert top.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in top.output
        assert "\x1b[?1049l" in top.output


def test_a_closed_terminal_ends_the_view(shared_stack: Stack) -> None:
    """Nothing is left running."""
    with terminal("top", "--url", shared_stack.url) as top:
        top.shows("inferer-0")
        top.close()
        top.process.wait(PATIENCE_S)


def test_once_prints_everything_once_without_escape_codes(shared_stack: Stack) -> None:
    """Without a terminal, and with --once on one: all of it, once, and no escape codes in a pipe;
    as JSON one object."""
    job_id = shared_stack.submit(prompt="go on", max_tokens=4000)

    def check(*flags: str) -> str:
        command = [str(scripts() / "sluice"), "top", "--url", shared_stack.url, *flags]
        done = subprocess.run(
            command,
            env={**clean_environment(), "TERM": "xterm-256color"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def running() -> str | None:
        shown = check()
        return shown if job_id in shown else None

    shown = eventually(running, "it runs")
    assert "/4000" in shown
    assert "inferer-0" in shown
    assert "waiting by priority" in shown
    assert "\x1b" not in shown
    printed = json.loads(check("--json"))
    assert printed.keys() == {"queue", "inferers", "at"}
    assert [queue["model"] for queue in printed["queue"]] == ["tiny"]
    assert [entry["id"] for entry in printed["inferers"]] == ["inferer-0"]
    shared_stack.http.delete(f"/jobs/{job_id}")
    with terminal("top", "--url", shared_stack.url, "--once") as top:
        assert top.process.wait(PATIENCE_S) == 0
        assert "inferer-0" in top.output
        assert "\x1b[?1049h" not in top.output


def test_inferers_fit_into_80_columns(shared_stack: Stack) -> None:
    """The id of a running job is on one line."""
    job_id = shared_stack.submit(prompt="go on", max_tokens=4000)
    shared_stack.wait_for_state(job_id, "STARTED")

    def shown() -> str | None:
        with terminal("inferers", "--url", shared_stack.url) as inferers:
            assert inferers.process.wait(PATIENCE_S) == 0
            return inferers.output if job_id in inferers.output else None

    lines = eventually(shown, "the job is reported").splitlines()
    assert max(len(ESCAPE.sub("", line)) for line in lines) <= 80
    shared_stack.http.delete(f"/jobs/{job_id}")


def test_the_live_view_waits_for_a_gateway_and_once_is_status_3(shared_stack: Stack) -> None:
    """The live view waits for a gateway to come; one report has status 3."""
    url = f"http://127.0.0.1:{free_port()}"
    with terminal("top", "--url", url) as top:
        top.shows("no gateway at")
        top.type(b"\x03")
        assert top.process.wait(PATIENCE_S) == 0
    done = subprocess.run(
        [scripts() / "sluice", "top", "--once", "--url", url],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert "sluice up" in line
