"""`GET /jobs/<id>`: a job's request and what happened to it, also after it has ended."""

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest

from shared.job_ids import new_job_id
from tests.support.command_line import sluice
from tests.support.processes import PATIENCE_S, Stack, eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def shown_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A second gateway keeps no requests."""
    with Stack(tmp_path_factory.mktemp("shown")) as running:
        running.serve(tiny_model)
        running.start_gateway(GATEWAY_KEEP_REQUESTS_H="0")
        eventually(lambda: _is_ready(running.urls[1]), "the second gateway is ready")
        yield running


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=PATIENCE_S).status_code == 200
    except httpx2.TransportError:
        return False


def details(stack: Stack, job_id: str, gateway: int = 0) -> dict[str, Any]:
    answer = httpx2.get(f"{stack.urls[gateway]}/jobs/{job_id}", timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_request_is_shown_while_it_waits_and_when_it_has_ended(shown_stack: Stack) -> None:
    """From the queue, then from the copy; the timeline tells where the time went."""
    running = shown_stack.submit(prompt="go on", ignore_eos=True)
    answer = shown_stack.http.post(
        "/jobs",
        json={"prompt": "Once upon", "max_tokens": 3, "metadata": {"user": "u1"}},
        headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
    )
    job_id = answer.json()["id"]
    waiting = details(shown_stack, job_id)
    assert (waiting["status"]["state"], waiting["request_from"]) == ("PENDING", "queue")
    assert waiting["request"]["prompt"] == "Once upon"
    assert [entry["event"] for entry in waiting["timeline"]] == ["accepted"]
    shown_stack.http.delete(f"/jobs/{running}").raise_for_status()
    status = shown_stack.wait_for_end(job_id)

    ended = eventually(lambda: _kept(shown_stack, job_id), "it has left the queue")
    assert ended["status"] == status
    assert ended["request"] == waiting["request"]
    assert ended["request"]["metadata"] == {"user": "u1"}
    assert ended["trace_id"] == TRACE
    timeline = ended["timeline"]
    names = [entry["event"] for entry in timeline]
    assert names == ["accepted", "started", "first_token", "result"]
    assert (timeline[0]["via"], timeline[1]["inferer"]) == ("http", "inferer-0")
    assert (timeline[1]["attempt"], timeline[3]["state"]) == (1, "SUCCESS")
    assert [entry["at"] for entry in timeline] == sorted(entry["at"] for entry in timeline)
    assert ended["events_complete"]
    assert (ended["dead"], ended["retried_as"]) == (False, None)


def _kept(stack: Stack, job_id: str) -> dict[str, Any] | None:
    found = details(stack, job_id)
    return found if found["request_from"] == "kept" else None


def test_a_gateway_that_keeps_no_requests_shows_none(shown_stack: Stack) -> None:
    """Neither the whole nor its beginning, whichever gateway is asked."""
    answer = httpx2.post(
        f"{shown_stack.urls[1]}/jobs",
        json={"prompt": "secret", "max_tokens": 1},
        timeout=PATIENCE_S,
    )
    job_id = answer.json()["id"]
    shown_stack.wait_for_end(job_id)
    for gateway in (0, 1):
        found = eventually(partial(_gone, shown_stack, job_id, gateway), "it left")
        assert (found["request"], found["request_from"]) == (None, None)
        page = httpx2.get(
            f"{shown_stack.urls[gateway]}/jobs?id={job_id}", timeout=PATIENCE_S
        ).json()
        assert page["jobs"][0]["preview"] == ""


def test_a_gateway_that_others_can_reach_shows_no_jobs_of_others(
    shown_stack: Stack,
) -> None:
    """Neither ids nor prompts, from wherever they could come; what is known by its id is as
    before."""
    running = shown_stack.submit(prompt="go on", ignore_eos=True)
    job_id = shown_stack.submit(prompt="secret", max_tokens=1, metadata={"user": "u1"})
    found = details(shown_stack, job_id, gateway=1)
    assert (found["request"], found["request_from"]) == (None, None)
    assert found["status"]["state"] == "PENDING"
    page = httpx2.get(f"{shown_stack.urls[1]}/jobs?id={job_id}", timeout=PATIENCE_S).json()
    assert page["jobs"][0]["preview"] == ""

    shown_stack.start_gateway(GATEWAY_HOST="0.0.0.0")
    url = shown_stack.urls[2]
    eventually(lambda: _is_ready(url), "the third gateway is ready")
    everything = {"where": {"since": "2020-01-01T00:00:00Z"}}
    answers = [
        *(httpx2.get(f"{url}{path}", timeout=PATIENCE_S) for path in ("/jobs", "/dead")),
        *(
            httpx2.post(f"{url}{path}", json=everything, timeout=PATIENCE_S)
            for path in ("/jobs/cancel", "/dead/retry", "/dead/drop")
        ),
    ]
    for answer in answers:
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (403, "listing_refused"), answer.text
        assert "GATEWAY_LIST_JOBS=true" in problem["detail"]
    for command in ("jobs", "dead list"):
        shown = sluice(shown_stack, *command.split(), gateway=2)
        assert (shown.returncode, "GATEWAY_LIST_JOBS=true" in shown.stderr) == (2, True)
    assert httpx2.get(f"{url}/dead/{job_id}", timeout=PATIENCE_S).status_code == 404
    found = details(shown_stack, job_id, gateway=2)
    assert (found["status"]["state"], found["request"]) == ("PENDING", None)
    cancelled = httpx2.post(
        f"{url}/jobs/cancel", json={"ids": [job_id, running]}, timeout=PATIENCE_S
    )
    assert cancelled.json()["done"] == 2
    shown_stack.end_gateway()


def _gone(stack: Stack, job_id: str, gateway: int) -> dict[str, Any] | None:
    found = details(stack, job_id, gateway)
    return None if found["request_from"] == "queue" else found


def test_an_unknown_job_is_404(shown_stack: Stack) -> None:
    for job_id in (new_job_id(), "x"):
        assert shown_stack.http.get(f"/jobs/{job_id}").status_code == 404


async def test_the_copies_have_bounds_of_their_own(shown_stack: Stack) -> None:
    """They are kept for 48 hours, in a tenth of the storage at most: the oldest go first."""
    client = await nats.connect(shown_stack.nats.url)
    kept = (await client.jetstream().stream_info("KEPT")).config
    assert kept.max_age == 48 * 3600
    assert kept.max_bytes is not None
    assert 0 < kept.max_bytes <= 1024**3
    assert kept.max_msgs_per_subject == 1
    await client.close()


def test_without_room_for_copies_jobs_run_all_the_same(tmp_path: Path, tiny_model: Path) -> None:
    """An earlier version may have left less room than they would take: the gateway says so and
    serves."""
    with Stack(tmp_path, store="20MB") as stack:
        _reserve(stack, 17_000_000)
        stack.serve(tiny_model)
        stack.gateways[0].wait_for("requests_not_kept")
        job_id = stack.submit(prompt="x", max_tokens=1)
        assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
        page = stack.http.get("/jobs").json()
        assert [job["id"] for job in page["jobs"]] == [job_id]


def _reserve(stack: Stack, size: int) -> None:
    async def reserve() -> None:
        client = await nats.connect(stack.nats.url)
        await client.jetstream().add_stream(name="BALLAST", subjects=["ballast"], max_bytes=size)
        await client.close()

    asyncio.run(reserve())
