"""`GET /jobs`: which jobs there are, the same at every gateway, whenever it was started."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest

from tests.support.command_line import sluice
from tests.support.processes import PATIENCE_S, Stack, eventually

LONG: dict[str, Any] = {"prompt": "go on", "n": 8, "ignore_eos": True}
"""Runs longer than any of these tests."""


@pytest.fixture(scope="module")
def listed_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("listed")) as running:
        running.serve(tiny_model)
        yield running


def listed(url: str, **query: Any) -> dict[str, Any]:
    """A page of a gateway that has read everything."""

    def complete() -> dict[str, Any] | None:
        try:
            answer = httpx2.get(f"{url}/jobs", params=query, timeout=PATIENCE_S)
        except httpx2.TransportError:
            return None
        if answer.status_code == 503:
            return None
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page if page["covers"]["complete"] else None

    return eventually(complete, "a complete list")


def without_etas(page: dict[str, Any]) -> dict[str, Any]:
    """Every job that has a position has an ETA, which changes all the time."""
    for job in page["jobs"]:
        assert ("eta" in job) == ("position" in job)
        job.pop("eta", None)
    return page


def make_jobs(stack: Stack) -> dict[str, str]:
    """Jobs of several states. The last one waits behind one that runs."""
    ids = {
        "done": stack.submit(prompt="Once", max_tokens=3, metadata={"user": "u1", "n": 1}),
        "chat": stack.submit(
            messages=[{"role": "user", "content": "Name three"}], max_tokens=3, priority="high"
        ),
        "late": stack.submit(prompt="x " * 20_000, max_tokens=1, metadata={"user": "u2"}),
    }
    for job_id in ids.values():
        stack.wait_for_end(job_id)
    ids["running"] = stack.submit(**LONG, metadata={"user": "u1"})
    stack.wait_for_state(ids["running"], "STARTED")
    ids["revoked"] = stack.submit(prompt="x", max_tokens=1)
    stack.http.delete(f"/jobs/{ids['revoked']}").raise_for_status()
    ids["waiting"] = stack.submit(prompt="x", max_tokens=1, priority="low")
    return ids


def test_the_same_page_after_a_restart_and_from_another_gateway(stack: Stack) -> None:
    """Jobs that wait, run and have ended: one gateway saw them happen, another starts later, and
    the first starts again."""
    ids = make_jobs(stack)
    first = without_etas(listed(stack.urls[0]))
    assert [job["id"] for job in first["jobs"]] == list(ids.values())[::-1]
    by_name = dict(zip(ids, first["jobs"][::-1], strict=True))
    states = {name: job["state"] for name, job in by_name.items()}
    assert states == {
        "done": "SUCCESS",
        "chat": "SUCCESS",
        "late": "FAILURE",
        "running": "STARTED",
        "revoked": "REVOKED",
        "waiting": "PENDING",
    }
    assert by_name["late"]["code"] == "prompt_too_long"
    assert by_name["done"]["metadata"] == {"user": "u1", "n": 1}
    assert (by_name["done"]["preview"], by_name["chat"]["preview"]) == ("Once", "Name three")
    assert by_name["done"]["completion_tokens"] == 3
    assert by_name["running"]["inferer"] == "inferer-0"
    assert {name: job["position"] for name, job in by_name.items() if "position" in job} == {
        "waiting": 0
    }
    assert {job["via"] for job in first["jobs"]} == {"http"}

    stack.start_gateway()
    assert without_etas(listed(stack.urls[1])) == first
    stack.gateways[0].kill()
    stack.gateways[0] = stack._start("gateway", 7, GATEWAY_PORT=stack.urls[0].rpartition(":")[2])
    assert without_etas(listed(stack.urls[0])) == first
    filtered = listed(stack.urls[0], **{"metadata.user": "u1", "state": "STARTED,SUCCESS"})
    assert [job["id"] for job in filtered["jobs"]] == [ids["running"], ids["done"]]
    assert filtered == listed(stack.urls[1], **{"metadata.user": "u1", "state": "STARTED,SUCCESS"})


def test_a_job_is_listed_as_soon_as_it_is_accepted(listed_stack: Stack) -> None:
    """And its end as soon as its status has it, also by a gateway that did neither."""
    listed_stack.start_gateway()
    other = listed_stack.urls[1]
    listed(other)
    for _ in range(10):
        job_id = listed_stack.submit(prompt="x", max_tokens=1)
        assert listed(other, id=job_id)["total"] == 1
        listed_stack.wait_for_end(job_id)
        (job,) = listed(other, id=job_id)["jobs"]
        assert job["state"] == "SUCCESS"
    listed_stack.end_gateway()


def test_a_job_whose_deadline_has_passed_is_not_listed_as_waiting(listed_stack: Stack) -> None:
    """Whether or not anybody asked for its status."""
    running = listed_stack.submit(**LONG)
    job_id = listed_stack.submit(prompt="x", timeout_s=0.5)

    def has_expired() -> bool:
        (job,) = listed(listed_stack.url, id=job_id)["jobs"]
        return (job["state"], job["code"]) == ("FAILURE", "deadline_passed")

    eventually(has_expired, "the job is listed as expired")
    listed_stack.http.delete(f"/jobs/{running}").raise_for_status()


@pytest.mark.parametrize("slots", [1, 2])
def test_jobs_that_wait_have_the_position_and_eta_of_their_status(
    tmp_path: Path, tiny_model: Path, slots: int
) -> None:
    """Behind those that run, by priority; over HTTP, over NATS and on the command line."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, INFERER_CONCURRENCY=str(slots))
        stack.wait_until_served("tiny")
        ended = stack.submit(prompt="x", max_tokens=100)
        stack.wait_for_end(ended)
        running = [stack.submit(**LONG) for _ in range(slots)]
        for job_id in running:
            stack.wait_for_state(job_id, "STARTED")
        waiting = [
            stack.submit(prompt="x", max_tokens=max_tokens, ignore_eos=True, priority=priority)
            for priority in ("low", "normal", "high")
            for max_tokens in (300, 3000)
        ]
        expected = dict(zip(waiting, (4, 5, 2, 3, 0, 1), strict=True))
        jobs = {job["id"]: job for job in listed(stack.url)["jobs"]}
        for job_id, position in expected.items():
            job, status = jobs[job_id], stack.status(job_id)
            assert job["position"] == status["position"] == position
            assert job["eta"].keys() == status["eta"].keys()
            # Those that run have come further meanwhile. With a clock that stands still, the two
            # are equal: see test_listed_estimates.py.
            assert 1 / 2 < job["eta"]["p50_s"] / status["eta"]["p50_s"] < 2
        for job_id in (ended, *running):
            assert not {"position", "eta"} & jobs[job_id].keys()

        over_nats = asyncio.run(listed_over_nats(stack, {"state": "PENDING"}))
        assert {job["id"]: job["position"] for job in over_nats["jobs"]} == expected
        assert all(job["eta"]["p50_s"] > 0 for job in over_nats["jobs"])
        rows = sluice(stack, "jobs", "--priority", "low").stdout.splitlines()[1:3]
        assert ["5 ahead of it, done in about" in rows[0], "4 ahead of it" in rows[1]] == [True] * 2


async def listed_over_nats(stack: Stack, query: dict[str, Any]) -> dict[str, Any]:
    client = await nats.connect(stack.nats.url)
    answer = await client.request("infer.jobs", json.dumps(query).encode(), timeout=PATIENCE_S)
    await client.close()
    page: dict[str, Any] = json.loads(answer.data)
    return page


def test_a_wrong_parameter_is_400_with_what_is_allowed(listed_stack: Stack) -> None:
    answer = listed_stack.http.get("/jobs", params={"stat": "PENDING"})
    problem = answer.json()
    assert (answer.status_code, problem["param"]) == (400, "stat")
    assert "give state, code, model, priority, inferer, owner, via" in problem["detail"]
    for name, value in {"state": "DONE", "limit": "0", "cursor": "x", "since": "soon"}.items():
        answer = listed_stack.http.get("/jobs", params={name: value})
        assert answer.status_code == 400, (name, answer.text)
        assert name in answer.json()["detail"]


async def test_the_same_list_over_nats(listed_stack: Stack) -> None:
    """With the same fields; an unknown one is 400 with the one that was meant."""
    job_id = listed_stack.submit(prompt="x", max_tokens=1, metadata={"of": "nats"})
    listed_stack.wait_for_end(job_id)
    expected = listed(listed_stack.url, **{"metadata.of": "nats"})
    query = {"metadata": {"of": "nats"}, "state": "SUCCESS"}
    assert await listed_over_nats(listed_stack, query) == expected
    client = await nats.connect(listed_stack.nats.url)
    everything = await client.request("infer.jobs", b"", timeout=PATIENCE_S)
    assert json.loads(everything.data)["total"] >= 1
    wrong = await client.request("infer.jobs", b'{"stat": "SUCCESS"}', timeout=PATIENCE_S)
    headers = wrong.headers or {}
    assert headers["Nats-Service-Error-Code"] == "400"
    assert (
        "stat is not a field of this request; did you mean state?"
        in (headers["Nats-Service-Error"])
    )
    await client.close()


def test_the_command_line_lists_and_shows_jobs(listed_stack: Stack) -> None:
    """`sluice jobs` with filters, and `sluice job` with the beginning of an id."""
    job_id = listed_stack.submit(prompt="Once upon", max_tokens=2, metadata={"of": "cli"})
    listed_stack.wait_for_end(job_id)
    shown = sluice(listed_stack, "jobs", "--metadata", "of=cli", "--state", "success")
    assert shown.returncode == 0, shown.stderr
    (row, count) = shown.stdout.splitlines()[1:]
    assert row.split()[:3] == [job_id, "SUCCESS", "tiny"]
    assert row.rstrip().endswith("Once upon")
    assert count == "1 job"
    page = json.loads(
        sluice(listed_stack, "jobs", "--since", "1h", "--limit", "1", "--json").stdout
    )
    assert [job["id"] for job in page["jobs"]] == [job_id]
    job = sluice(listed_stack, "job", job_id[:30])
    assert "SUCCESS" in job.stdout
    assert "started on inferer-0 (attempt 1)" in job.stdout
    assert '"prompt": "Once upon"' in job.stdout
    wrong = sluice(listed_stack, "jobs", "--state", "done")
    assert (wrong.returncode, "FAILURE or PENDING" in wrong.stderr) == (2, True)
    assert sluice(listed_stack, "jobs", "--metadata", "of").returncode == 2
    unknown = sluice(listed_stack, "job", "ffff")
    assert (unknown.returncode, "no job" in unknown.stderr) == (2, True)
