"""A job that kills its inferer: it ends by name, and the jobs beside it complete."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import write_hybrid
from tests.support.doctor import examine
from tests.support.processes import (
    ROOT,
    Process,
    Stack,
    clean_environment,
    eventually,
    server_sent_events,
)
from tests.support.schemas import TOO_MUCH
from tests.support.shim import (
    ABORTING,
    EXITING,
    POISON,
    POISONED,
    TOKENIZER_POISON,
    write_shim,
)
from tests.support.tiny_model import write_tiny_model

ATTEMPTS = 2


@pytest.fixture(scope="module")
def poisoned_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shim(tmp_path_factory.mktemp("shim"), POISONED)


class Fleet(Stack):
    """Two inferers with two slots each, started again whenever one dies."""

    def __init__(self, folder: Path, model: Path, library: Path | None = None) -> None:
        super().__init__(folder)
        self._model, self._library = model, library
        self.deaths: list[Process] = []
        self.start_gateway()
        self.live = [self._start_again(number) for number in (0, 1)]
        self.wait_until_served(model.stem, inferers=2)

    def _start_again(self, number: int) -> Process:
        return self.start_inferer(
            self._model,
            INFERER_ID=f"inferer-{number}",
            INFERER_CONCURRENCY="2",
            INFERER_MAX_ATTEMPTS=str(ATTEMPTS),
            **({"LLAMA_CPP_LIB_PATH": str(self._library)} if self._library else {}),
        )

    def start_innocent(self, tokens: int = 3000) -> list[str]:
        """Three jobs that run for some seconds; they have started."""
        jobs = [self.submit(prompt="go on", max_tokens=tokens, seed=seed) for seed in (1, 2, 3)]
        for job_id in jobs:
            self.wait_for_state(job_id, "STARTED", "SUCCESS")
        return jobs

    def wait_for_end(self, job_id: str) -> dict[str, Any]:
        def check() -> dict[str, Any] | None:
            for number, inferer in enumerate(self.live):
                if inferer.popen.poll() is not None:
                    self.deaths.append(inferer)
                    self.inferers.remove(inferer)
                    self.live[number] = self._start_again(number)
            found = self.status(job_id)
            return found if found["finished_at"] else None

        return eventually(check, f"{job_id} ends", patience_s=150)


@pytest.fixture
def fleet(tmp_path: Path, tiny_model: Path, poisoned_library: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, tiny_model, poisoned_library) as running:
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("poison", "cause", "status", "doing"),
    [
        (TOKENIZER_POISON, "signal 11 (SIGSEGV)", -signal.SIGSEGV, "tokenizing its prompt"),
        (EXITING, "exit status 3", 3, "computing its prompt"),
        (ABORTING, "signal 6 (SIGABRT)", -signal.SIGABRT, "generating its tokens"),
    ],
    ids=["tokenizer", "prompt", "token"],
)
def test_the_culprit_ends_by_name_and_the_innocent_complete(
    fleet: Fleet, poison: str, cause: str, status: int, doing: str
) -> None:
    """A poisoned job beside three innocent ones, two slots and two inferers: the innocent
    complete with at most one more attempt, the inferers die at most as often as the poisoned job
    may start, and its failure says of what, and in the middle of what."""
    innocent = fleet.start_innocent()
    poisoned = fleet.submit(prompt=f"a {poison} here", max_tokens=5)
    for job_id in innocent:
        ended = fleet.wait_for_end(job_id)
        assert (ended["state"], ended["error"]) == ("SUCCESS", None)
        assert ended["attempts"] in (1, 2)
    lost = fleet.wait_for_end(poisoned)
    assert (lost["state"], lost["attempts"]) == ("FAILURE", ATTEMPTS)
    assert lost["error"] == {
        "code": "worker_lost",
        "message": f"attempt 2 of 2 ended with its inferer: {cause} while {doing}, running alone",
    }
    assert len(fleet.deaths) <= ATTEMPTS
    assert {died.popen.returncode for died in fleet.deaths} == {status}
    reports = [report for died in fleet.deaths for report in died.events("inferer_died")]
    assert all(poisoned in report["job_ids"] for report in reports)
    assert {report["cause"] for report in reports} == {cause}
    died = [one for found in examine(fleet).values() for one in found if "died at" in one["found"]]
    assert died
    assert all(doing in one["found"] for one in died)


def schema_job(schema: dict[str, object]) -> dict[str, object]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"prompt": "answer:", "max_tokens": 30, "response_format": form}


ONCE_DEADLY = [
    (schema_job({"type": "string", "maxLength": 20_000}), None),
    (schema_job({"type": "string", "maxLength": 2_147_483_647}), None),
    (schema_job({"type": "array", "items": {"type": "integer"}, "maxItems": 20_000}), None),
    (schema_job({"type": "string", "pattern": "^([a-z]?){40}$"}), None),
    (schema_job({"type": "string", "pattern": "^x([a-z]?){40}$"}), None),
    (schema_job(TOO_MUCH), "invalid_request"),
]
LONG_WORD = [({"prompt": "a" * 100_000, "max_tokens": 5}, "prompt_too_long")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("pre_tokenizer", "jobs"),
    [
        ("smollm", ONCE_DEADLY),
        ("tekken", LONG_WORD),
        ("gpt-4o", LONG_WORD),
        ("deepseek-llm", LONG_WORD),
    ],
)
def test_what_once_killed_is_answered_or_refused(
    tmp_path: Path, pre_tokenizer: str, jobs: list[tuple[dict[str, object], str | None]]
) -> None:
    """Beside three innocent jobs, two slots and two inferers: each ends in its first attempt, with
    an answer or by name; so do the innocent, and no inferer dies."""
    model = write_tiny_model(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": pre_tokenizer})
    with Fleet(tmp_path, model) as fleet:
        innocent = fleet.start_innocent(1500)
        poisoned = [fleet.submit(**body) for body, _ in jobs]
        for job_id, (_, code) in zip(poisoned, jobs, strict=True):
            ended = fleet.wait_for_end(job_id)
            assert (ended["error"] or {}).get("code") == code, ended
            assert ended["attempts"] == 1
        for job_id in innocent:
            ended = fleet.wait_for_end(job_id)
            assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
        assert fleet.deaths == []


@pytest.mark.timeout(300)
def test_cancels_on_a_hybrid_leave_the_others_alone(tmp_path: Path) -> None:
    """A memory that cannot be rewound, two slots and two inferers: of jobs that are cancelled in
    the middle, each ends as cancelled; three innocent ones beside them complete."""
    with Fleet(tmp_path, write_hybrid(tmp_path / "lfm2.gguf")) as fleet:
        innocent = fleet.start_innocent(1500)
        for _ in range(3):
            cancelled = fleet.submit(prompt="word " * 2000, max_tokens=2000)
            fleet.wait_for_state(cancelled, "STARTED")
            assert fleet.http.delete(f"/jobs/{cancelled}").is_success
            assert fleet.wait_for_end(cancelled)["state"] == "REVOKED"
        for job_id in innocent:
            ended = fleet.wait_for_end(job_id)
            assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
        assert fleet.deaths == []


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path, poisoned_library: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as running:
        running.start_gateway()
        running.start_inferer(tiny_model, LLAMA_CPP_LIB_PATH=str(poisoned_library))
        running.wait_until_served("tiny")
        yield running


def test_a_reader_of_events_learns_of_the_death_at_once(stack: Stack) -> None:
    """Of what the inferer died, before the lease has run out; meanwhile the status is RETRY."""
    job_id = stack.submit(prompt=f"a {POISON} here", max_tokens=5)
    with stack.http.stream("GET", f"/jobs/{job_id}/events") as response:
        events = server_sent_events(response)
        failed = next(event for event in events if event["event"] == "attempt_failed")
    printed = json.loads(failed["data"])
    assert (printed["code"], printed["attempt"]) == ("worker_lost", 1)
    assert printed["message"] == "signal 11 (SIGSEGV) while computing its prompt, running alone"
    status = stack.status(job_id)
    assert status["state"] == "RETRY"
    assert status["last_error"] == {"code": "worker_lost", "message": printed["message"]}
    (inferer,) = stack.inferers
    assert inferer.wait() == -signal.SIGSEGV


def test_a_death_while_the_broker_is_away_is_reported_later(stack: Stack) -> None:
    """The report waits for the broker for some seconds, and no longer."""
    job_id = stack.submit(prompt="go on", max_tokens=4000)
    stack.wait_for_state(job_id, "STARTED")
    (inferer,) = stack.inferers
    stack.nats.process.kill()
    os.kill(inferer.family()[1], signal.SIGABRT)
    assert inferer.wait() == -signal.SIGABRT
    assert inferer.events("inferer_died")[0]["cause"] == "signal 6 (SIGABRT)"
    assert inferer.events("crash_report_not_published")
    assert "Fatal Python error: Aborted" in inferer.output()  # and where in our code


def test_a_death_that_cannot_be_reported_for_lack_of_memory(stack: Stack) -> None:
    """The code that reports a death is imported only then, which needs memory. The process still
    ends as its child did, and says why it could not report."""
    (inferer,) = stack.inferers
    parent, child = inferer.family()
    pages = int(Path(f"/proc/{parent}/statm").read_text().split()[0])
    _, most = resource.prlimit(parent, resource.RLIMIT_AS)
    resource.prlimit(parent, resource.RLIMIT_AS, (pages * resource.getpagesize(), most))
    os.kill(child, signal.SIGKILL)
    assert inferer.wait() == -signal.SIGKILL
    assert "Traceback" not in inferer.output()
    assert "inferer: the child process died (exit status -9), and this cannot" in inferer.output()


def test_the_child_ends_with_its_parent(stack: Stack) -> None:
    """kill -9 of what was started leaves nothing running; SIGTERM ends both in good order."""
    (inferer,) = stack.inferers
    _, *children = inferer.family()
    assert children
    inferer.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "all are gone")


def holds(number: signal.Signals, pid: int) -> bool:
    """Whether the process holds the signal back: Python itself has started, where Ctrl-C always
    is a traceback. Between fork and exec, all are held back."""
    if b"services." not in Path(f"/proc/{pid}/cmdline").read_bytes():
        return False
    fields = dict(
        line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["SigBlk"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_inferer_stops_while_it_starts(
    tmp_path: Path, tiny_model: Path, number: signal.Signals
) -> None:
    """Whenever it comes: it ends in good order, and says nothing of a death or an interrupt. A
    terminal sends Ctrl-C to parent and child alike."""
    with Stack(tmp_path) as stack:
        for part in (stack.start_inferer(tiny_model), stack.start_gateway()):
            eventually(
                lambda: holds(number, part.family()[-1]) or bool(part.output()),  # noqa: B023
                "it starts, or has started already",
            )
            for pid in part.family():
                os.kill(pid, number)
            assert part.wait() == 0, part.output()
            assert "Traceback" not in part.output()
            assert not part.events("inferer_died")


def test_the_demo_says_what_the_inferer_died_of(tmp_path: Path) -> None:
    """Once, with what to do, and it ends; it does not show the prompt again and again."""
    question = "Why is the sky blu"
    assert len(question) == len(TOKENIZER_POISON)  # the length is compiled in
    library = write_shim(tmp_path / "shim", POISONED.replace(TOKENIZER_POISON, question))
    done = subprocess.run(
        [sys.executable, "-m", "cli.demo"],
        cwd=ROOT,
        env={**clean_environment(), "LLAMA_CPP_LIB_PATH": str(library)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1, done.stdout
    shown = " ".join(done.stdout.split())
    assert "The inferer died: signal 11 (SIGSEGV) while tokenizing its prompt" in shown
    assert "make .venv" in shown
    assert shown.count(f"▶ {question}") <= 1


def test_a_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """kill -9 leaves nothing of its stack running."""
    demo = Process([sys.executable, "-m", "cli.demo"], tmp_path / "log", {"TMPDIR": str(tmp_path)})
    eventually(lambda: len(demo.family()) >= len(("demo", "up", "nats", "gateway")), "it starts")
    started = demo.family()
    demo.kill()
    eventually(lambda: not any(map(is_running, started)), "all are gone")


def is_running(pid: int) -> bool:
    """Whether it lives, and is not only waited for."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
