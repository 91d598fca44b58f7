"""`sluice up`: the whole stack as a user runs it, and what it survives."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx2
import nats

from shared.counts import counted
from shared.cpus import own_cpus, usable_cpus
from shared.wire import subjects
from tests.support.nats_client import flush
from tests.support.processes import Process, eventually, scripts
from tests.support.tiny_model import write_tiny_model
from tests.support.up import Up


def processes_using(folder: Path) -> list[str]:
    """Command lines and environments that name ``folder``: what `sluice up` on it has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text and int(process.name) != os.getpid():
            found.append(text.decode(errors="replace"))
    return found


def test_ready_serves_and_stops_without_a_trace(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """stdout has one line; a request is served right after it; Ctrl-C ends every process."""
    up = Up(tmp_path / "data", tiny_model)
    ups.append(up)
    up.wait_until_ready()
    answer = up.http.post(
        "/jobs", json={"prompt": "hi", "max_tokens": 2}, headers={"prefer": "wait=30"}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["state"] == "SUCCESS"
    children = [up.pid_of(name) for name in ("nats", "gateway", "inferer-1")]
    for pid in children:
        assert os.getsid(pid) == pid  # a session of its own
    assert up.stop(signal.SIGINT) == 0
    assert up.stdout.count("\n") == 1
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert processes_using(tmp_path / "data") == []


async def test_an_inferer_killed_in_the_middle_of_a_job(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """kill -9: it is started again, the job runs a second time, the client that was waiting gets
    its answer, and one result is stored and announced."""
    up = Up(tmp_path / "data", tiny_model)
    ups.append(up)
    up.wait_until_ready()
    connection = await nats.connect(up.nats_url)
    announced = await connection.subscribe(subjects.FINISHED_WILDCARD)
    await flush(connection)

    def ask() -> httpx2.Response:
        body, headers = {"prompt": "long", "max_tokens": 1500}, {"prefer": "wait=120"}
        return httpx2.post(f"{up.url}/jobs", json=body, headers=headers, timeout=150)

    def accepted() -> str | None:
        lines = [line for line in up.stderr.splitlines() if '"request_accepted"' in line]
        return str(json.loads(lines[0])["job_id"]) if lines else None

    def kill() -> str:
        job_id = eventually(accepted, "accepted")
        up.wait_for_state(job_id, "STARTED")
        os.kill(up.pid_of("inferer-1"), signal.SIGKILL)
        return job_id

    first_pid = up.pid_of("inferer-1")
    answer, job_id = await asyncio.gather(asyncio.to_thread(ask), asyncio.to_thread(kill))

    assert answer.status_code == 200
    status = answer.json()
    assert (status["id"], status["state"], status["attempts"]) == (job_id, "SUCCESS", 2)
    assert up.pid_of("inferer-1") != first_pid
    assert up.http.get(f"/status/{job_id}").json() == status

    await flush(connection)
    stored = await connection.jetstream().stream_info(subjects.RESULTS, subjects_filter=">")
    assert stored.state.subjects == {subjects.result("tiny", job_id): 1}
    assert announced.pending_msgs == 1
    await connection.close()
    eventually(
        lambda: up.http.get("/queue").json()["models"][0]["in_flight"] == 0, "the queue is empty"
    )


def test_jobs_survive_a_stop_of_everything(tmp_path: Path, tiny_model: Path, ups: list[Up]) -> None:
    """SIGTERM with jobs running and waiting; `sluice up` on the same data completes them all."""
    data = tmp_path / "data"
    first = Up(data, tiny_model)
    ups.append(first)
    first.wait_until_ready()
    ids = [first.submit(prompt=f"job {number}", max_tokens=2000) for number in range(5)]
    first.wait_for_state(ids[0], "STARTED")
    assert first.stop() == 0
    assert processes_using(data) == []

    second = Up(data, tiny_model)
    ups.append(second)
    second.wait_until_ready()
    for job_id in ids:
        status = second.wait_for_state(job_id, "SUCCESS", "FAILURE", "REVOKED")
        assert (status["state"], status["attempts"]) == ("SUCCESS", 1)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path, tiny_model: Path, ups: list[Up]) -> None:
    """While a job ends, it is said what is waited for. The job runs again later."""
    data = tmp_path / "data"
    first = Up(data, tiny_model, "--log-format", "plain")
    ups.append(first)
    first.wait_until_ready()
    job_id = first.submit(prompt="long", max_tokens=4000, n=8, ignore_eos=True)
    first.wait_for_state(job_id, "STARTED")
    first.popen.send_signal(signal.SIGINT)
    said = "up: waiting for running jobs, up to 10 s; Ctrl-C again ends everything at once"
    eventually(lambda: said in first.stderr, f"it is said\n{first.stderr}")
    first.popen.send_signal(signal.SIGINT)
    assert first.popen.wait(30) == 0
    assert "inferer-1: warning: child killed" in first.stderr
    assert processes_using(data) == []

    second = Up(data, tiny_model)
    ups.append(second)
    second.wait_until_ready()
    second.wait_for_state(job_id, "STARTED")
    assert second.http.delete(f"/jobs/{job_id}").json()["state"] == "REVOKED"


def test_a_gateway_and_a_broker_that_die_come_back(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """kill -9 of either: it is started again and the stack serves."""
    up = Up(tmp_path / "data", tiny_model)
    ups.append(up)
    up.wait_until_ready()
    for child in ("gateway", "nats"):
        before = up.pid_of(child)
        os.kill(before, signal.SIGKILL)

        def restarted(child: str = child, before: int = before) -> bool:
            return up.pid_of(child) != before

        eventually(restarted, f"{child} is restarted")

        def served() -> bool:
            try:
                answer = up.http.post(
                    "/jobs", json={"prompt": "hi", "max_tokens": 2}, headers={"prefer": "wait=30"}
                )
            except httpx2.TransportError:
                return False
            return answer.status_code == 200 and answer.json()["state"] == "SUCCESS"

        eventually(served, f"served after kill -9 of {child}\n{up.stderr}")


def test_sluice_up_killed_leaves_no_process(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """kill -9 of `sluice up` itself: its children end, and the folder can be used again."""
    data = tmp_path / "data"
    up = Up(data, tiny_model)
    ups.append(up)
    up.wait_until_ready()
    up.popen.kill()
    up.popen.wait(10)
    eventually(lambda: processes_using(data) == [], "all children ended")
    again = Up(data, tiny_model)
    ups.append(again)
    again.wait_until_ready()


def test_a_part_that_cannot_start_says_why(tmp_path: Path, tiny_model: Path, ups: list[Up]) -> None:
    """A locked folder, a port that is taken, a model that is missing: one line, status 2."""
    up = Up(tmp_path / "data", tiny_model)
    ups.append(up)
    up.wait_until_ready()
    port = up.url.rpartition(":")[2]
    for options, word in (
        (["--data", str(tmp_path / "data"), "--port", "0"], "another `sluice up` (process"),
        (["--data", str(tmp_path / "other"), "--port", port], "choose another with --port"),
        (["--data", str(tmp_path / "other"), "--model", "/none.gguf"], "/none.gguf does not exist"),
    ):
        command = [str(scripts() / "sluice"), "up", "--nats-port", "0", *options]
        if "--port" not in options:
            command += ["--port", "0"]
        process = Process(command, tmp_path / "failed.log")
        assert process.wait() == 2
        assert word in process.output()
        assert "Traceback" not in process.output()


def test_each_inferer_has_cpus_of_its_own(tmp_path: Path, tiny_model: Path, ups: list[Up]) -> None:
    """As many as there are CPUs run apart; one more is refused."""
    count = usable_cpus()
    up = Up(tmp_path / "data", tiny_model, "--inferers", str(count))
    ups.append(up)
    up.wait_until_ready()

    def check() -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = up.http.get("/inferers").json()["inferers"]
        return found if len(found) == count else None

    shares = [entry["cpus"] for entry in eventually(check, "all are live")]
    assert sorted(cpu for share in shares for cpu in share) == own_cpus()[:count]
    assert [len(share) for share in shares] == [1] * count
    command = [str(scripts() / "sluice"), "up", "--inferers", str(count + 1), "--port", "0"]
    process = Process(
        [*command, "--nats-port", "0", "--data", str(tmp_path / "other")], tmp_path / "refused.log"
    )
    assert process.wait() == 2
    assert f"{count + 1} inferers on {counted(count, 'CPU')}:" in process.output()


def test_a_stack_without_inferers_accepts_jobs(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """`--inferers 0` says that jobs wait, and an inferer that is started elsewhere serves them."""
    up = Up(tmp_path / "data", tiny_model, "--inferers", "0")
    ups.append(up)
    up.wait_until_ready()
    eventually(lambda: up.events("no_inferers") or None, "it is said")
    job_id = up.submit(prompt="hi", max_tokens=2)
    assert up.starts_of("inferer-1") == []
    inferer = Process(
        [sys.executable, "-m", "services.inferer"],
        tmp_path / "inferer.log",
        {"NATS_URL": up.nats_url, "INFERER_MODEL": str(tiny_model), "INFERER_THREADS": "1"},
    )
    try:
        up.wait_for_state(job_id, "SUCCESS")
    finally:
        inferer.end()


def test_an_inferer_that_refuses_to_start_again_is_given_up(tmp_path: Path) -> None:
    """Its model has gone: after some tries it is left alone, with a word, and the other serves on;
    when that is given up as well, `sluice up` ends and says why."""
    model = write_tiny_model(tmp_path / "tiny.gguf")
    up = Up(tmp_path / "data", model, "--inferers", "2")
    try:
        up.wait_until_ready()
        eventually(lambda: len(up.http.get("/inferers").json()["inferers"]) == 2, "both live")
        model.unlink()
        os.kill(up.pid_of("inferer-1"), signal.SIGKILL)
        eventually(lambda: up.events("child_given_up"), "inferer-1 is given up", 150)
        up.wait_for_state(up.submit(prompt="hi", max_tokens=2), "SUCCESS")
        os.kill(up.pid_of("inferer-2"), signal.SIGKILL)
        eventually(lambda: up.popen.poll() is not None, "sluice up has ended", 150)
        assert up.popen.returncode == 2
        assert f"the model {model} does not exist" in up.stderr
        assert len(up.starts_of("inferer-1")) < 10
    finally:
        up.end()
