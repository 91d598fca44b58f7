"""The fleet as gateways, NATS clients and the command see it."""

import asyncio
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.cpus import own_cpus, usable_cpus
from shared.timestamps import milliseconds_between
from shared.wire import subjects
from tests.support.processes import Stack, eventually, printed_by, scripts


def test_an_inferer_reports_what_it_is_and_does(stack: Stack, nats_command: str) -> None:
    """Model, slots, CPUs and speed, before its first job that of the self-test; the same over HTTP,
    NATS, the CLI."""
    (idle,) = _inferers(stack)
    assert (idle["id"], idle["model"], idle["slots"]) == ("inferer-0", "tiny", 1)
    assert (idle["state"], idle["jobs"], idle["threads"]) == ("idle", [], 1)
    assert idle["cpus"] == own_cpus()
    tested = (idle["tokens_per_s"], idle["prompt_tokens_per_s"])
    assert min(tested) > 0
    assert idle["slowdowns"] == [1.0]
    assert idle["jobs_per_batch"] is None

    job_id = stack.submit(prompt="go on", max_tokens=2000)
    (busy,) = eventually(lambda: _busy(stack), "the inferer reports its job")
    (job,) = busy["jobs"]
    assert (job["id"], job["attempt"], job["max_tokens"]) == (job_id, 1, 2000)
    assert 0 <= job["completion_tokens"] <= 2000
    stack.http.delete(f"/jobs/{job_id}")

    assert stack.wait_for_end(stack.submit(prompt="go on", max_tokens=20))["state"] == "SUCCESS"
    (measured,) = eventually(lambda: _idle(stack), "the inferer has done its job")
    assert min(measured["tokens_per_s"], measured["prompt_tokens_per_s"]) > 0
    assert (measured["tokens_per_s"], measured["prompt_tokens_per_s"]) != tested
    lists = (
        printed_by(
            [nats_command, "--server", stack.nats.url, "req", "infer.inferers", "", "--raw"]
        ),
        printed_by([str(scripts() / "sluice"), "inferers", "--url", stack.url, "--json"]),
    )
    for printed in lists:
        assert [entry["id"] for entry in json.loads(printed)["inferers"]] == ["inferer-0"]
    table = printed_by([str(scripts() / "sluice"), "inferers", "--url", stack.url])
    assert "inferer-0" in table
    assert "idle" in table


def test_an_inferer_reports_how_many_jobs_a_batch_has(stack: Stack, tiny_model: Path) -> None:
    """If each job has a context of its own: as many as there are threads."""
    stack.start_inferer(
        tiny_model, INFERER_THREADS="2", INFERER_CONCURRENCY="3", INFERER_BATCHING="off"
    )
    stack.wait_until_served("tiny", 2)
    separate = next(one for one in _inferers(stack) if one["slots"] == 3)
    assert separate["jobs_per_batch"] == 2
    assert separate["slowdowns"][2] == pytest.approx(1.5 * separate["slowdowns"][1], abs=0.002)


def test_inferers_that_share_cpus_are_reported(stack: Stack, tiny_model: Path) -> None:
    """In the log of both, once, and in /inferers; one that is in nobody's way is not named."""
    threads = str(usable_cpus())
    second = stack.start_inferer(tiny_model, INFERER_THREADS=threads)
    first = stack.inferers[0]
    shown = second.wait_for("cpus_overlap")
    assert (shown["level"], shown["inferer"], shown["other"]) == (
        "warning",
        "inferer-1",
        "inferer-0",
    )
    assert (shown["threads"], shown["other_threads"]) == (int(threads), 1)
    assert shown["cpus"] == shown["other_cpus"] == own_cpus()
    assert "INFERER_THREADS" in shown["hint"]
    assert first.wait_for("cpus_overlap")["other"] == "inferer-1"
    overlaps = {entry["id"]: entry["overlaps"] for entry in _inferers(stack)}
    assert overlaps == {"inferer-0": ["inferer-1"], "inferer-1": ["inferer-0"]}
    assert "shares CPUs with" in printed_by(
        [str(scripts() / "sluice"), "inferers", "--url", stack.url]
    )

    third = stack.start_inferer(tiny_model, INFERER_THREADS=threads)
    # The first has checked again once it knows the third, and reports nothing twice.
    assert first.wait_for("cpus_overlap", 2)["other"] == "inferer-2"
    third.terminate()
    second.terminate()
    assert [entry["overlaps"] for entry in _inferers(stack)] == [[]]
    assert [shown["other"] for shown in first.events("cpus_overlap")] == ["inferer-1", "inferer-2"]
    assert "shares CPUs" not in printed_by(
        [str(scripts() / "sluice"), "inferers", "--url", stack.url]
    )


def test_inferers_come_and_go(stack: Stack, tiny_model: Path) -> None:
    """One that stops is gone at once, one that is killed within ten seconds and some."""
    second = stack.start_inferer(tiny_model)
    third = stack.start_inferer(tiny_model)
    eventually(lambda: _ids(stack) == ["inferer-0", "inferer-1", "inferer-2"], "three are live")
    second.terminate()
    assert _ids(stack) == ["inferer-0", "inferer-2"]
    third.kill()
    eventually(lambda: _ids(stack) == ["inferer-0"], "the dead one is gone")


def test_a_second_inferer_shares_a_backlog(
    stack: Stack, tiny_model: Path, nats_command: str
) -> None:
    """It takes a job as soon as it is ready, though all of them came before it; nothing has to be
    configured, and the broker's limit is 2, and 1 again when it has left."""
    ids = [stack.submit(prompt="go on", max_tokens=400) for _ in range(50)]
    second = stack.start_inferer(tiny_model)
    ready_at = second.wait_for("inferer_ready")["timestamp"]
    eventually(lambda: _broker_limit(stack, nats_command) == 2, "the limit has followed")
    ended = [stack.wait_for_end(job_id) for job_id in ids]
    assert {job["state"] for job in ended} == {"SUCCESS"}
    assert {job["attempts"] for job in ended} == {1}
    started = sorted(job["started_at"] for job in ended if job["inferer"] == "inferer-1")
    assert len(started) > 5
    # Within a second on a quiet machine; this one is shared.
    assert milliseconds_between(ready_at, started[0]) < 10_000
    assert second.terminate() == 0
    eventually(lambda: _broker_limit(stack, nats_command) == 1, "the limit has followed")


def test_the_limit_follows_a_crash(stack: Stack, tiny_model: Path) -> None:
    """A killed inferer's place is kept until its job has come back to another; then it is gone."""
    stack.wait_until_served("tiny")
    assert _limit(stack) == 1
    second = stack.start_inferer(tiny_model)
    eventually(lambda: _limit(stack) == 2, "one for each")
    ids = [stack.submit(prompt="go on", max_tokens=2000) for _ in range(4)]
    held = eventually(lambda: _job_of(stack, "inferer-1"), "the second runs a job")
    second.kill()
    eventually(lambda: _ids(stack) == ["inferer-0"], "the dead one is gone")
    rerun = eventually(lambda: _second_attempt(stack, held), "its job runs again")
    assert rerun["inferer"] == "inferer-0"
    eventually(lambda: _limit(stack) == 1, "the limit is right again")
    for job_id in ids:
        assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
    limits = [event["limit"] for event in stack.gateways[0].events("limit_set")]
    # Two checks at the same moment may both set what both have seen.
    assert [limit for limit, _ in groupby(limits)] == [1, 2, 1]


def test_concurrency_is_changed_while_running(stack: Stack, nats_command: str) -> None:
    """Slots open and close without a restart, the limit follows at once, and running jobs are not
    touched; over the command line, NATS and HTTP."""
    first = stack.submit(prompt="go on", max_tokens=1500, seed=1)
    stack.wait_for_state(first, "STARTED")
    second = stack.submit(prompt="go on", max_tokens=1500, seed=1)
    assert stack.status(second)["state"] == "PENDING"
    shown = printed_by([str(scripts() / "sluice"), "concurrency", "2", "--url", stack.url])
    assert shown == "inferer-0: 1 → 2\n"
    assert _limit(stack) == 2
    both = stack.wait_for_state(second, "STARTED")
    assert stack.status(first)["state"] == "STARTED"

    order = json.dumps({"concurrency": 1, "inferer": "inferer-0"})
    request = ["--server", stack.nats.url, "req", "infer.concurrency", order, "--raw"]
    (change,) = json.loads(printed_by([nats_command, *request]))["inferers"]
    assert (change["before"], change["concurrency"]) == (2, 1)
    assert _limit(stack) == 1
    third = stack.submit(prompt="go on", max_tokens=1)
    ended = [stack.wait_for_end(job_id) for job_id in (first, second, third)]
    assert [(job["state"], job["attempts"]) for job in ended] == [("SUCCESS", 1)] * 3
    assert [job["result"]["usage"]["completion_tokens"] for job in ended] == [1500, 1500, 1]
    assert both["started_at"] < ended[0]["finished_at"]
    # With one slot again, the third began when both had ended.
    assert ended[2]["started_at"] >= max(job["finished_at"] for job in ended[:2])


def test_auto_opens_slots_while_jobs_wait(tmp_path: Path, tiny_model: Path) -> None:
    """From one on, and the limit follows; a number that is set ends it."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, INFERER_CONCURRENCY="auto")
        stack.wait_until_served("tiny")
        assert _limit(stack) == 1
        # More may not pay here, by what has been measured. With this seed none ends by itself.
        ids = [stack.submit(prompt="tell me", max_tokens=4000, seed=1) for _ in range(2)]
        eventually(lambda: len(_inferers(stack)[0]["jobs"]) == 2, "both run at once")
        eventually(lambda: _limit(stack) == _inferers(stack)[0]["slots"], "the limit follows")
        shown = printed_by([str(scripts() / "sluice"), "concurrency", "1", "--url", stack.url])
        assert shown.endswith(" → 1\n")
        for job_id in ids:
            stack.http.delete(f"/jobs/{job_id}")
            assert stack.wait_for_end(job_id)["state"] == "REVOKED"
        assert (_limit(stack), _inferers(stack)[0]["slots"]) == (1, 1)


def test_an_inferer_without_slots_takes_nothing(stack: Stack) -> None:
    """0 lets the running job end and keeps the others waiting until there is a slot again."""
    first = stack.submit(prompt="go on", max_tokens=800)
    stack.wait_for_state(first, "STARTED")
    (change,) = stack.http.put("/concurrency", json={"concurrency": 0}).json()["inferers"]
    assert (change["before"], change["concurrency"], change.get("refused")) == (1, 0, None)
    second = stack.submit(prompt="go on", max_tokens=1)
    assert stack.wait_for_end(first)["state"] == "SUCCESS"
    eventually(lambda: not _inferers(stack)[0]["jobs"], "nothing runs")
    assert stack.status(second)["state"] == "PENDING"
    stack.http.put("/concurrency", json={"concurrency": 1, "model": "tiny"})
    assert stack.wait_for_end(second)["state"] == "SUCCESS"


def test_invalid_concurrency_is_refused(stack: Stack) -> None:
    """Nobody fits: 404. Out of range: 400. Nobody answers: reported for each inferer."""
    for wanted in ({"inferer": "nobody"}, {"model": "other"}):
        answer = stack.http.put("/concurrency", json={"concurrency": 1, **wanted})
        assert (answer.status_code, answer.json()["code"]) == (404, "inferer_not_found")
    for content in ('{"concurrency":-1}', '{"concurrency":65}', '{"concurrency":"2"}', "{}"):
        assert stack.http.put("/concurrency", content=content).status_code == 400
    stack.inferers[0].freeze()
    (change,) = stack.http.put("/concurrency", json={"concurrency": 2}).json()["inferers"]
    assert "does not answer" in change["refused"]
    stack.inferers[0].thaw()


async def test_faster_inferers_are_served_first(stack: Stack, tiny_model: Path) -> None:
    """One of a higher number takes only what the others cannot take at once."""
    stack.start_inferer(tiny_model, INFERER_PRIORITY="5")
    eventually(lambda: _limit(stack) == 2, "one for each")
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        for _ in range(6):
            while (await broker.js.consumer_info(subjects.REQUESTS, "tiny")).num_waiting != 2:
                await asyncio.sleep(0.01)
            job = stack.wait_for_end(stack.submit(prompt="x", max_tokens=1))
            assert job["inferer"] == "inferer-0"
    together = [stack.submit(prompt="go on", max_tokens=1500) for _ in range(2)]
    both = {stack.wait_for_end(job_id)["inferer"] for job_id in together}
    assert both == {"inferer-0", "inferer-1"}


def _broker_limit(stack: Stack, nats_command: str) -> int:
    command = [nats_command, "-s", stack.nats.url, "consumer", "info", "REQUESTS", "tiny", "-j"]
    return int(json.loads(printed_by(command))["config"]["max_ack_pending"])


def _limit(stack: Stack) -> int:
    (queue,) = stack.http.get("/queue").json()["models"]
    return int(queue["limit"])


def _job_of(stack: Stack, inferer: str) -> str | None:
    running = {entry["id"]: entry["jobs"] for entry in _inferers(stack)}
    return str(running[inferer][0]["id"]) if running.get(inferer) else None


def _second_attempt(stack: Stack, job_id: str) -> dict[str, Any] | None:
    status = stack.status(job_id)
    return status if status["attempts"] == 2 else None


def _inferers(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.http.get("/inferers").json()["inferers"]
    return found


def _ids(stack: Stack) -> list[str]:
    return [entry["id"] for entry in _inferers(stack)]


def _busy(stack: Stack) -> list[dict[str, Any]] | None:
    return [
        entry for entry in _inferers(stack) if entry["state"] == "busy" and entry["jobs"]
    ] or None


def _idle(stack: Stack) -> list[dict[str, Any]] | None:
    found = _inferers(stack)
    return [entry for entry in found if entry["state"] == "idle"] or None


def test_a_restarted_inferer_serves_while_the_lease_of_its_job_runs(
    stack: Stack, tiny_model: Path
) -> None:
    """Killed in the middle of a job and started again under the same id: what waits does not wait
    for that lease to expire, and the limit is right again when the job has come back."""
    stack.wait_until_served("tiny")
    endless = stack.submit(prompt="go on", max_tokens=4000)
    stack.wait_for_state(endless, "STARTED")
    killed = stack.inferers[0]
    killed.kill()
    waiting = stack.submit(prompt="hi", max_tokens=2)
    again = stack.start_inferer(tiny_model, INFERER_ID="inferer-0")
    assert stack.wait_for_end(waiting)["state"] == "SUCCESS"
    assert stack.status(endless)["attempts"] == 1  # it has not come back yet
    again.wait_for("job_finished")
    rerun = eventually(lambda: _second_attempt(stack, endless), "its job runs again")
    assert rerun["inferer"] == "inferer-0"
    eventually(lambda: _limit(stack) == 1, "the limit is right again")
    stack.http.delete(f"/jobs/{endless}")
