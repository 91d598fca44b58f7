"""`sluice up --min --max --idle-s`: inferers come when jobs wait, and go when idle."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cli.up.autoscale import Autoscaler
from cli.up.child import Child
from cli.up.scale import Scale
from shared.cpus import usable_cpus
from tests.support.processes import Process, Stack, clean_environment, eventually, scripts
from tests.support.up import Up

LONG = 1500
"""Tokens of a job that takes some seconds."""

Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path, ups: list[Up]) -> Start:
    """`sluice up` with a model and options, ready; always on the same data."""

    def start(model: Path, options: str = "", **environment: str) -> Up:
        up = Up(tmp_path / "data", model, *options.split(), **environment)
        ups.append(up)
        return up.wait_until_ready()

    return start


def inferers(up: Up) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = up.http.get("/inferers").json()["inferers"]
    return found


def wait_until_gone(up: Up, count: int) -> dict[str, Any]:
    """Until the inferers have left ``count`` times; the last one's line."""
    eventually(lambda: len(up.events("inferer_scaled_down")) >= count, f"{count} left\n{up.stderr}")
    return up.events("inferer_scaled_down")[count - 1]


def seconds_between(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def check_undisturbed(up: Up, job_id: str) -> dict[str, Any]:
    """Wait until the job ends; it has run once, to its own end."""
    status = up.wait_for_state(job_id, "SUCCESS", "FAILURE", "REVOKED")
    assert (status["state"], status["attempts"]) == ("SUCCESS", 1), up.stderr
    assert not up.events("child_died"), up.stderr
    assert not up.events("child_killed"), up.stderr
    return status


def test_inferers_are_started_for_jobs_and_leave_when_idle(start: Start, tiny_model: Path) -> None:
    """Ready without an inferer; a job brings one, which leaves after the time and not before; so
    does the next job. The alias may be chosen."""
    up = start(tiny_model, "--min 0 --max 1 --idle-s 2", INFERER_ALIAS="chosen")
    assert inferers(up) == []
    assert up.starts_of("inferer-1") == []
    for count in (1, 2):
        status = check_undisturbed(up, up.submit(prompt="hi", max_tokens=2, model="chosen"))
        retired = wait_until_gone(up, count)
        assert seconds_between(status["finished_at"], retired["timestamp"]) >= 2
        assert inferers(up) == []
        starts = up.starts_of("inferer-1")
        assert len(starts) == count
        assert not Path(f"/proc/{starts[-1]}").exists()
    assert up.stop() == 0


def test_a_job_longer_than_the_idle_time_runs_to_its_end(start: Start, tiny_model: Path) -> None:
    """It runs to its end, and so do the jobs that waited behind it."""
    up = start(tiny_model, "--min 0 --max 1 --idle-s 0.1")
    ids = [up.submit(prompt=f"job {number}", max_tokens=LONG) for number in range(3)]
    ended = [check_undisturbed(up, job_id)["finished_at"] for job_id in ids]
    assert wait_until_gone(up, 1)["timestamp"] > max(ended)
    assert len(up.starts_of("inferer-1")) == 1


def test_jobs_that_come_while_an_inferer_leaves_are_answered(
    start: Start, tiny_model: Path
) -> None:
    """Each is submitted at the moment in which the idle inferer takes no more, and is answered."""
    up = start(tiny_model, "--min 0 --max 1 --idle-s 0.1")
    for _ in range(4):
        closed = len(up.events("concurrency_set"))
        check_undisturbed(up, up.submit(prompt="hi", max_tokens=2))
        _wait_until_closed(up, closed + 1)


def _wait_until_closed(up: Up, times: int) -> None:
    eventually(
        lambda: len(up.events("concurrency_set")) >= times,
        f"commanded {times} times to take no more jobs\n{up.stderr}",
    )


async def test_an_inferer_with_a_job_does_not_leave(stack: Stack, tiny_model: Path) -> None:
    """A job has come since the reading: commanded to take no more jobs, the inferer keeps
    the one it has, stays, and gets its slot back."""
    stack.inferers.pop().terminate()
    child = Child(
        "inferer-1",
        [sys.executable, "-m", "services.inferer"],
        {
            **clean_environment(),
            "NATS_URL": stack.nats.url,
            "INFERER_ID": "inferer-1",
            "INFERER_MODEL": str(tiny_model),
            "INFERER_THREADS": "1",
        },
    )
    child.start()
    running = asyncio.create_task(child.run())
    try:
        job_id = stack.submit(prompt="long", max_tokens=LONG)
        await asyncio.to_thread(stack.wait_for_state, job_id, "STARTED")
        autoscaler = Autoscaler(stack.url, "tiny", 1, Scale(0, 1, 0.1), [child])
        await autoscaler._scale_down(child, 1)
        assert stack.status(job_id)["state"] == "STARTED"
        assert child.is_wanted
        (entry,) = stack.http.get("/inferers").json()["inferers"]
        assert (entry["id"], entry["slots"], entry["state"]) == ("inferer-1", 1, "busy")
        status = await asyncio.to_thread(stack.wait_for_end, job_id)
        assert (status["state"], status["attempts"]) == ("SUCCESS", 1)
    finally:
        await child.stop(10)
        await running


def test_as_many_inferers_are_started_as_jobs_wait(start: Start, tiny_model: Path) -> None:
    """One for one job, then one for each further job until no CPU is free, on CPUs of their own.
    All leave again."""
    up = start(tiny_model, "--min 0 --idle-s 0.1")
    ids = [up.submit(prompt="long", max_tokens=2 * LONG)]
    up.wait_for_state(ids[0], "STARTED")
    assert len(up.events("inferer_scaled_up")) == 1
    count = usable_cpus()
    ids += [up.submit(prompt="long", max_tokens=LONG) for _ in range(2 * count)]
    eventually(lambda: len(inferers(up)) == count, f"all are live\n{up.stderr}")
    cpus = [cpu for entry in inferers(up) for cpu in entry["cpus"]]
    assert len(cpus) == len(set(cpus)) == count
    for job_id in ids:
        check_undisturbed(up, job_id)
    assert len(up.events("inferer_scaled_up")) == count
    wait_until_gone(up, count)
    assert inferers(up) == []


def test_the_minimum_of_inferers_stays(start: Start, tiny_model: Path) -> None:
    """As many as `--min` says are there when it is ready and never leave."""
    up = start(tiny_model, "--min 1 --idle-s 0.1")
    count = usable_cpus()
    assert len(up.events("child_started")) == 3
    ids = [up.submit(prompt="long", max_tokens=LONG) for _ in range(2 * count)]
    for job_id in ids:
        check_undisturbed(up, job_id)
    eventually(lambda: len(inferers(up)) == 1, f"only one is left\n{up.stderr}")
    check_undisturbed(up, up.submit(prompt="long", max_tokens=LONG))
    assert len(up.events("child_started")) - len(up.events("inferer_scaled_down")) == 3


def test_a_job_outlives_the_kill_of_its_inferer(start: Start, tiny_model: Path) -> None:
    """It is started again, and stays until the job has come back to it and is done."""
    up = start(tiny_model, "--min 0 --max 1 --idle-s 0.1")
    job_id = up.submit(prompt="long", max_tokens=LONG)
    up.wait_for_state(job_id, "STARTED")
    os.kill(up.pid_of("inferer-1"), signal.SIGKILL)
    status = up.wait_for_state(job_id, "SUCCESS", "FAILURE", "REVOKED")
    assert (status["state"], status["attempts"]) == ("SUCCESS", 2)
    assert wait_until_gone(up, 1)["timestamp"] > status["finished_at"]
    assert len(up.starts_of("inferer-1")) == 2


def test_a_job_that_names_no_model_starts_an_inferer(
    start: Start, tiny_model: Path, tiny_base_model: Path
) -> None:
    """The queue remembers another model and no inferer is live: the one given here is meant."""
    assert start(tiny_model).stop() == 0
    up = start(tiny_base_model, "--min 0 --max 1")
    status = check_undisturbed(up, up.submit(prompt="hi", max_tokens=2))
    assert status["model"] == "tiny-base"


def test_a_model_that_cannot_be_loaded_ends_with_a_reason(
    start: Start, tiny_model: Path, tmp_path: Path
) -> None:
    """Only llama.cpp knows which architectures it can load, so the first job finds out: the
    sentence is there, and `sluice up` ends with status 2."""
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(tiny_model.read_bytes().replace(b"llama", b"other"))
    up = start(unknown, "--min 0 --max 1")
    up.submit(prompt="hi")
    assert up.popen.wait(60) == 2, up.stderr
    assert f"cannot load the model {unknown}" in up.stderr
    assert "Traceback" not in up.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--inferers 1 --min 0", "give either --inferers or --min and --max"),
        ("--inferers 1 --max 1", "give either --inferers or --min and --max"),
        ("--min 2 --max 1", "--min 2 is more than --max 1"),
        ("--concurrency 0", "give a number from 1 to 64, or auto"),
        ("--concurrency many", "give a number from 1 to 64, or auto"),
        ("--min 0 --idle-s 0", "--idle-s 0: give more than 0 seconds"),
        ("--min 0 --max 1000", "1000 inferers on "),
        ("--min 1000", "1000 inferers on "),
    ],
)
def test_contradictory_options_are_refused(tmp_path: Path, options: str, sentence: str) -> None:
    """One line, status 2, and nothing is started."""
    command = [str(scripts() / "sluice"), "up", "--port", "0", "--nats-port", "0"]
    process = Process(
        [*command, "--data", str(tmp_path / "data"), *options.split()], tmp_path / "log"
    )
    assert process.wait() == 2
    assert sentence in process.output()
    assert process.output().count("\n") == 1
