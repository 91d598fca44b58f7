"""The `sluice` command as people and scripts run it; `sluice up` has a file of its own."""

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from shared import __version__
from tests.support.processes import (
    PATIENCE_S,
    NatsServer,
    Stack,
    clean_environment,
    eventually,
    free_port,
    scripts,
)

AN_ID = "01890000-0000-7000-8000-000000000000"
OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

Ended = subprocess.CompletedProcess[str]
Sluice = Callable[..., Ended]


def run(*arguments: str, stdin: str | None = None, **environment: str) -> Ended:
    """Run `sluice` to its end."""
    return subprocess.run(
        [scripts() / "sluice", *arguments],
        env={**clean_environment(), **environment},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def sluice(shared_stack: Stack) -> Sluice:
    """`sluice` with the gateway of the shared stack."""

    def with_url(*arguments: str, stdin: str | None = None) -> Ended:
        return run(*arguments, stdin=stdin, SLUICE_URL=shared_stack.url)

    return with_url


def test_several_answers_are_printed_one_after_another(sluice: Sluice) -> None:
    """As they come, and with the status afterwards."""
    options = ("--max-tokens", "20", "--seed", "7", "-n", "3")
    status = json.loads(sluice("ask", "Tell me something", *options, "--json").stdout)
    first, second, third = (choice["text"] for choice in status["result"]["choices"])
    asked = sluice("ask", "Tell me something", *options)
    assert asked.stdout == f"{first}\n\nanswer 2:\n{second}\n\nanswer 3:\n{third}\n"
    shown = sluice("status", status["id"]).stdout
    assert shown.endswith(f"answer 1:\n{first}\nanswer 2:\n{second}\nanswer 3:\n{third}\n")


def test_ask_prints_the_answer(sluice: Sluice) -> None:
    """The text alone on stdout, so that it can be piped; the same seed gives the same."""
    options = ("--max-tokens", "20", "--seed", "7")
    asked = sluice("ask", "Tell me something", *options)
    assert (asked.returncode, asked.stderr) == (OK, "")
    status = json.loads(sluice("ask", "Tell me something", *options, "--json").stdout)
    assert asked.stdout == status["result"]["text"] + "\n"
    assert status["state"] == "SUCCESS"
    assert status["result"]["usage"]["completion_tokens"] == 20
    assert status["result"]["message"]["role"] == "assistant"
    other = sluice("ask", "Tell me something", *options[:3], "8")
    assert other.stdout != asked.stdout


def test_ask_streams(shared_stack: Stack, tmp_path: Path) -> None:
    """The first tokens are on stdout while the job still runs."""
    with (tmp_path / "out").open("wb") as out:
        asking = _start(shared_stack, "ask", "go on", "--max-tokens", "4000", stdout=out)
    eventually(lambda: (tmp_path / "out").stat().st_size > 0, "text on stdout")
    assert asking.poll() is None
    asking.send_signal(signal.SIGINT)
    asking.wait(PATIENCE_S)


def test_ask_reads_the_prompt_from_stdin(sluice: Sluice) -> None:
    """`-` reads it; what is piped in is what the model gets."""
    options = ("--raw", "--max-tokens", "10", "--seed", "7")
    piped = sluice("ask", "-", *options, stdin="once upon a time")
    assert piped.returncode == OK
    assert piped.stdout == sluice("ask", "once upon a time", *options).stdout
    assert sluice("ask", "-", "--raw", stdin="").returncode == USAGE


def test_options_reach_the_job(sluice: Sluice) -> None:
    """--system and --raw change the prompt, --model names the model."""

    def prompt_tokens(*options: str) -> int:
        asked = sluice("ask", "hi", "--max-tokens", "1", "--json", *options)
        return int(json.loads(asked.stdout)["result"]["usage"]["prompt_tokens"])

    plain = prompt_tokens("--model", "tiny", "--temperature", "0")
    assert prompt_tokens("--raw") < plain
    assert prompt_tokens("--system", "Always answer at great length. " * 10) > plain


def test_the_answer_matches_a_schema_and_ends_at_a_stop_string(
    sluice: Sluice, tmp_path: Path
) -> None:
    """--schema and --stop reach the job; --top-p 0 leaves only the most likely token."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}')
    answer = json.loads(sluice("ask", "hi", "--schema", str(schema)).stdout)
    assert set(answer) <= {1, 2}
    options = ("--raw", "--max-tokens", "30", "--top-p", "0")
    whole = sluice("ask", "once upon a time", *options, "--seed", "1").stdout
    assert sluice("ask", "once upon a time", *options, "--seed", "2").stdout == whole
    first, second = whole[5], whole[10]
    stopped = sluice("ask", "once upon a time", *options, "--stop", second, "--stop", first).stdout
    ends = min(whole.index(first), whole.index(second))
    assert stopped == whole[:ends] + "\n"


def test_follow_prints_the_whole_answer(
    shared_stack: Stack, sluice: Sluice, tmp_path: Path
) -> None:
    """Of a job that runs or has ended; Ctrl-C leaves the job running."""
    job_id = shared_stack.submit(prompt="a b c", max_tokens=30)
    followed = sluice("follow", job_id)
    assert (followed.returncode, followed.stderr) == (OK, "")
    status = shared_stack.status(job_id)
    assert followed.stdout == status["result"]["text"] + "\n"
    assert sluice("follow", job_id).stdout == followed.stdout
    assert json.loads(sluice("follow", job_id, "--json").stdout) == status

    running = shared_stack.submit(prompt="long", max_tokens=4000)
    with (tmp_path / "out").open("wb") as out, (tmp_path / "errors").open("wb") as errors:
        following = _start(shared_stack, "follow", running, stdout=out, stderr=errors)
    eventually(lambda: (tmp_path / "out").stat().st_size > 0, "text on stdout")
    following.send_signal(signal.SIGINT)
    assert following.wait(PATIENCE_S) == INTERRUPTED
    assert running in (tmp_path / "errors").read_text()
    assert shared_stack.status(running)["state"] == "STARTED"
    assert sluice("cancel", running).returncode == OK


def test_the_shell_completes_commands() -> None:
    """What the script that --install-completion installs asks the command."""
    asked = run("", _SLUICE_COMPLETE="complete_bash", COMP_WORDS="sluice fol", COMP_CWORD="1")
    assert asked.stdout.split() == ["follow"]


def test_the_beginning_of_an_id_is_enough(shared_stack: Stack, sluice: Sluice) -> None:
    """For every command that takes the id of a job, if only one job has it."""
    job_id = shared_stack.submit(prompt="long", max_tokens=4000)
    beginning = job_id[:-1]
    assert job_id in eventually(lambda: sluice("status", beginning).stdout, "it is listed")
    assert job_id in sluice("cancel", beginning).stdout
    assert sluice("follow", beginning).returncode == FAILED
    for command in ("status", "follow", "cancel", "job"):
        refused = sluice(command, "ffff")
        assert refused.returncode == USAGE
        assert refused.stderr == "sluice: no job with an id that begins with 'ffff'\n"


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_submit_prints_an_id_and_status_finds_it(
    shared_stack: Stack, sluice: Sluice, as_json: bool
) -> None:
    """submit prints an id that status understands."""
    flags = ["--json"] if as_json else []
    submitted = sluice("submit", "hi", "--max-tokens", "3", *flags)
    assert (submitted.returncode, submitted.stderr) == (OK, "")
    job_id = json.loads(submitted.stdout)["id"] if as_json else submitted.stdout.strip()
    text = shared_stack.wait_for_end(job_id)["result"]["text"]

    status = sluice("status", job_id, *flags)
    assert status.returncode == OK
    if as_json:
        assert json.loads(status.stdout) == shared_stack.status(job_id)
    else:
        assert "SUCCESS" in status.stdout
        assert job_id in status.stdout
        assert text in status.stdout


def test_submit_waits_for_the_result_if_asked(sluice: Sluice) -> None:
    """--wait prints what became of the job."""
    shown = sluice("submit", "hi", "--max-tokens", "3", "--wait")
    assert shown.returncode == OK
    assert "SUCCESS" in shown.stdout
    status = json.loads(sluice("submit", "hi", "--max-tokens", "3", "--wait", "--json").stdout)
    assert status["result"]["usage"]["completion_tokens"] == 3


def test_cancel_ends_a_job_and_queue_counts_it(shared_stack: Stack, sluice: Sluice) -> None:
    """A waiting job shows in the queue until it is cancelled; then its status is a failure."""
    running = shared_stack.submit(prompt="long", max_tokens=4000)
    waiting = shared_stack.submit(prompt="waits", max_tokens=5)
    shared_stack.wait_for_state(running, "STARTED")
    (queue,) = json.loads(sluice("queue", "--json").stdout)["models"]
    assert (queue["model"], queue["waiting"], queue["in_flight"]) == ("tiny", 1, 1)
    heading, row = sluice("queue").stdout.splitlines()
    assert "waiting" in heading
    assert row.split()[:5] == ["tiny", "1", "1", "1", "1"]

    cancelled = sluice("cancel", waiting)
    assert cancelled.returncode == OK
    assert "REVOKED" in cancelled.stdout
    assert json.loads(sluice("cancel", running, "--json").stdout)["state"] == "REVOKED"
    status = sluice("status", waiting)
    assert status.returncode == FAILED
    assert status.stdout.count("cancelled") == 1


def test_a_job_that_fails_is_status_1(sluice: Sluice) -> None:
    """With the reason on stderr, and also for --wait and --json."""
    options = ("--max-tokens", "4000", "--timeout-s", "0.2")
    asked = sluice("ask", "go on", *options)
    assert asked.returncode == FAILED
    assert "timed_out" in asked.stderr
    waited = sluice("submit", "go on", *options, "--wait")
    assert waited.returncode == FAILED
    assert waited.stderr.startswith("submitted ")
    assert "timed_out" in waited.stdout
    as_json = sluice("ask", "go on", *options, "--json")
    assert as_json.returncode == FAILED
    assert json.loads(as_json.stdout)["error"]["code"] == "timed_out"


def test_a_cancel_that_comes_too_late_is_status_1(shared_stack: Stack, sluice: Sluice) -> None:
    """The job has its result, and it stays."""
    job_id = shared_stack.submit(prompt="hi", max_tokens=1)
    shared_stack.wait_for_end(job_id)
    late = sluice("cancel", job_id)
    assert late.returncode == FAILED
    assert "already ended" in late.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "hi", "--no-such-option"], "No such option"),
        (["ask"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["ask", "hi", "--max-tokens", "many"], "'--max-tokens': 'many' is not a whole number"),
        (["ask", "hi", "--temperature", "x"], "'--temperature': 'x' is not a number"),
        (["jobs", "--limit", "201"], "201 is too large; give at most 200"),
        (["cancel", "--at-most", "0"], "0 is too small; give at least 1"),
        (["topology", "apply", "--replicas", "x"], "'--replicas': 'x' is not a whole number"),
        (["ask", "hi", "--priority", "urgent"], "'--priority': 'urgent' is not one of 'high'"),
        (["ask", "hi", "--max-tokens", "0"], "max_tokens"),
        (["ask", "hi", "--max-tokens", "5000"], "context"),
        (["ask", "hi", "--temperature", "3"], "temperature"),
        (["ask", "hi", "--temperature", "nan"], "temperature"),
        (["ask", "hi", "--timeout-s", "0"], "timeout_s"),
        (["ask", "hi", "--top-p", "2"], "top_p"),
        (["ask", "hi", "-n", "9"], "n must be at most 8"),
        (["ask", "hi", "--stop", ""], "stop"),
        (["ask", "hi", "--schema", "/nowhere"], "--schema /nowhere"),
        (["ask", "hi", "--schema", __file__], "is not JSON"),
        (["follow", "nonsense"], "nonsense"),
        (["follow", AN_ID], AN_ID),
        (["ask", "hi", "--model", "nope"], "nope"),
        (["ask", "hi", "--url", "no url"], "no url"),
        (["ask", "\udcff"], "UTF-8"),
        (["submit", "hi", "--max-tokens", "0"], "max_tokens"),
        (["status", "nonsense"], "nonsense"),
        (["status", "../healthz"], "healthz"),
        (["cancel", "nonsense"], "nonsense"),
        (["topology", "apply", "--model", "No Such "], "No Such "),
        (["topology", "apply", "--nats-url", "nats://127.0.0.1:port"], "port"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else "",
)
def test_used_wrongly_is_status_2(sluice: Sluice, arguments: list[str], says: str) -> None:
    """With a sentence on stderr, nothing on stdout and no stack trace."""
    ended = sluice(*arguments)
    assert (ended.returncode, ended.stdout) == (USAGE, ""), ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [["ask", "hi"], ["submit", "hi"], ["status", AN_ID], ["cancel", AN_ID], ["queue"]],
    ids=" ".join,
)
def test_no_gateway_is_status_3(arguments: list[str]) -> None:
    """With what to do about it, in one line."""
    ended = run(*arguments, "--url", f"http://127.0.0.1:{free_port()}")
    assert (ended.returncode, ended.stdout) == (UNREACHABLE, ""), ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "sluice up" in line


def test_the_version_is_printed() -> None:
    """Without a command."""
    printed = run("--version")
    assert (printed.returncode, printed.stdout.strip()) == (OK, __version__)


def test_topology_apply_creates_everything(nats_server: NatsServer) -> None:
    """The first run creates everything, the second has nothing to do."""

    def apply(*flags: str) -> Ended:
        return run("topology", "apply", "--model", "mine", *flags, NATS_URL=nats_server.url)

    first = apply()
    assert first.returncode == OK
    for made in (
        "stream REQUESTS: created",
        "stream KV_INFERERS: created",
        "consumers of mine: created",
    ):
        assert made in first.stdout
    assert json.loads(apply("--json").stdout) == {"changes": []}
    again = apply()
    assert (again.returncode, again.stdout) == (OK, "no changes needed\n")

    nats_server.process.kill()
    away = apply()
    assert (away.returncode, away.stdout) == (UNREACHABLE, "")
    assert nats_server.url in away.stderr.splitlines()[-1]
    assert "Traceback" not in away.stderr


def test_there_are_no_colours_without_a_terminal(shared_stack: Stack, sluice: Sluice) -> None:
    """No escape codes in what goes to a pipe, whatever the command."""
    job_id = shared_stack.submit(prompt="long", max_tokens=4000, timeout_s=0.1)
    shared_stack.wait_for_end(job_id)
    for arguments in (
        ("ask", "[bold]hi[/bold]", "--max-tokens", "5"),
        ("submit", "hi", "--max-tokens", "2", "--wait"),
        ("status", job_id),
        ("queue",),
        ("ask", "hi", "--max-tokens", "0"),
        ("status", "x"),
    ):
        ended = run(*arguments, SLUICE_URL=shared_stack.url, TERM="xterm-256color")
        assert "\x1b" not in ended.stdout + ended.stderr, arguments


@pytest.mark.parametrize("waits", [False, True], ids=["running", "waiting"])
def test_ctrl_c_cancels_the_job(shared_stack: Stack, tmp_path: Path, waits: bool) -> None:
    """SIGINT during ask: exit status 130 and the job is revoked, also one that only waits."""
    # As many as outlast the start of a command on a machine that is busy.
    before_it = range(10 if waits else 0)
    blockers = [shared_stack.submit(prompt="blocker", max_tokens=4000) for _ in before_it]
    known = _accepted(shared_stack) | set(blockers)
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        asking = _start(
            shared_stack, "ask", "go on", "--max-tokens", "4000", stdout=out, stderr=err
        )
    (job_id,) = eventually(lambda: _accepted(shared_stack) - known or None, "accepted")
    if not waits:
        eventually(lambda: (tmp_path / "out").stat().st_size > 0, "it streams")
    else:
        shared_stack.wait_for_state(job_id, "PENDING")
    asking.send_signal(signal.SIGINT)
    assert asking.wait(PATIENCE_S) == INTERRUPTED
    assert "Traceback" not in (tmp_path / "err").read_text()
    ended = shared_stack.wait_for_end(job_id)
    assert (ended["state"], ended["error"]["code"]) == ("REVOKED", "cancelled")
    for blocker in blockers:
        shared_stack.http.delete(f"/jobs/{blocker}")


def _accepted(stack: Stack) -> set[str]:
    return {event["job_id"] for event in stack.gateways[0].events("request_accepted")}


def _start(
    stack: Stack, *arguments: str, stdout: IO[bytes], stderr: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """`sluice` in the background; Ctrl-C reaches it even where this shell ignores it."""
    return subprocess.Popen(
        [scripts() / "sluice", *arguments],
        env={**clean_environment(), "SLUICE_URL": stack.url},
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=stdout,
        stderr=stderr,
    )


def test_ask_on_a_terminal_shows_progress_apart_from_the_answer(shared_stack: Stack) -> None:
    """Progress is for the terminal, the answer for stdout, byte for byte; also when it is piped."""
    command = [str(scripts() / "sluice"), "ask", "Tell me", "--max-tokens", "20", "--seed", "7"]
    environment = {**clean_environment(), "SLUICE_URL": shared_stack.url, "TERM": "xterm"}
    ours, theirs = pty.openpty()
    try:
        asked = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=PATIENCE_S,
        )
        os.close(theirs)
        shown = os.read(ours, 65536)
    finally:
        os.close(ours)
    plain = run(*map(str, command[1:]), SLUICE_URL=shared_stack.url)
    assert asked.stdout.decode() == plain.stdout
    assert len(plain.stdout) > 20
    assert b"tokens/s" in shown
    assert plain.stdout[:20].encode() not in shown


def test_a_prompt_that_is_not_text_is_refused(shared_stack: Stack) -> None:
    """One line and the status for wrong use."""
    asked = subprocess.run(
        [scripts() / "sluice", "ask", "-"],
        env={**clean_environment(), "SLUICE_URL": shared_stack.url},
        input=b"\xff\xfe",
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert (asked.returncode, asked.stdout) == (USAGE, b"")
    assert asked.stderr.startswith(b"sluice: stdin is not UTF-8")


@pytest.mark.parametrize("how", ["terminated", "nobody reads"])
def test_ask_that_is_stopped_cancels_its_job(shared_stack: Stack, how: str) -> None:
    """By SIGTERM, or as whoever reads its answer goes away: nothing runs on for nobody."""
    asking = subprocess.Popen(
        [scripts() / "sluice", "ask", "Go on", "--max-tokens", "2000"],
        env={**clean_environment(), "SLUICE_URL": shared_stack.url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asking.stdout is not None
    assert asking.stderr is not None
    assert asking.stdout.read(1)
    if how == "terminated":
        asking.terminate()
    else:
        asking.stdout.close()
    printed = asking.stderr.read()
    assert asking.wait(PATIENCE_S) == INTERRUPTED
    word, job_id = printed.split()
    assert word == "cancelled"
    assert shared_stack.wait_for_end(job_id)["state"] == "REVOKED"


def test_submit_that_is_stopped_prints_the_id(shared_stack: Stack) -> None:
    """Its job goes on, and can be found."""
    submitting = subprocess.Popen(
        [scripts() / "sluice", "submit", "Go on", "--max-tokens", "2000", "--wait"],
        env={**clean_environment(), "SLUICE_URL": shared_stack.url},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert submitting.stderr is not None
    word, job_id = submitting.stderr.readline().split()
    assert word == "submitted"
    submitting.terminate()
    printed = submitting.stderr.read()
    assert submitting.wait(PATIENCE_S) == INTERRUPTED, printed
    assert printed == f"the job continues: sluice status {job_id}\n"
    assert shared_stack.wait_for_end(job_id)["state"] == "SUCCESS"


@pytest.mark.parametrize("command", [("queue",), ("queue", "--json"), ("--help",)])
def test_output_that_cannot_be_written_ends_a_command_without_a_traceback(
    shared_stack: Stack, command: tuple[str, ...]
) -> None:
    """A reader that is gone ends a command without a word, a full disk with one line."""
    options = () if command == ("--help",) else ("--url", shared_stack.url)
    reader, gone = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for output, said in ((gone, 0), (full, 1)):
            ended = subprocess.run(
                [str(scripts() / "sluice"), *command, *options],
                stdout=output,
                stderr=subprocess.PIPE,
                env=clean_environment(),
                text=True,
                timeout=PATIENCE_S,
            )
            assert ended.returncode == 1
            assert ended.stderr.count("\n") == said, ended.stderr
    finally:
        os.close(gone)
        os.close(full)
    assert "No space left" in ended.stderr
