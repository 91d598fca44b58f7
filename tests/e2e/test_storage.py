"""The broker's storage runs short: jobs are refused in time, and no result is lost."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import nats
import nats.js.errors
import pytest
from nats.aio.client import Client

from tests.support.doctor import examine
from tests.support.processes import Stack, eventually


@pytest.fixture(scope="module")
def limited_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A stack whose broker grants it 20 MB."""
    with Stack(tmp_path_factory.mktemp("limited"), store="20MB") as running:
        running.serve(tiny_model)
        yield running


@pytest.fixture
async def client(limited_stack: Stack) -> AsyncIterator[Client]:
    """A connection whose stream `BALLAST`, if the test makes one, is gone afterwards."""
    connection = await nats.connect(limited_stack.nats.url)
    yield connection
    await _drop(connection)
    await connection.close()


async def test_above_four_fifths_no_job_is_taken_on(limited_stack: Stack, client: Client) -> None:
    """503 in each shape, with Retry-After; accepted jobs end; and with room all is as before."""
    waiting = limited_stack.submit(prompt="x", max_tokens=1500)
    await _fill(client, 17_000_000)
    body = {"prompt": "x", "max_tokens": 2}
    problem = eventually(
        lambda: _refusal(limited_stack.http.post("/jobs", json=body)), "the gateway has seen it"
    )
    assert int(problem.headers["retry-after"]) > 0
    assert problem.headers["content-type"] == "application/problem+json"
    assert (problem.json()["status"], problem.json()["code"]) == (503, "storage_short")
    error = limited_stack.http.post("/v1/completions", json=body)
    assert (error.status_code, error.json()["error"]["code"]) == (503, "storage_short")
    assert int(error.headers["retry-after"]) > 0
    answer = await client.request("infer.submit", b'{"prompt":"x"}', timeout=30)
    assert (answer.headers or {})["Nats-Service-Error-Code"] == "503"
    assert limited_stack.http.get("/readyz").status_code == 200
    (finding,) = (await asyncio.to_thread(examine, limited_stack))["storage"]
    assert finding["severity"] == "error"
    assert (
        "of 20 MiB used; above 80% new jobs are refused with 503 (storage_short)"
        in (finding["found"])
    )
    assert "SLUICE_STORE" in finding["advice"]
    assert limited_stack.wait_for_end(waiting)["state"] == "SUCCESS"

    await _drop(client)
    accepted = eventually(
        lambda: _accepted(limited_stack.http.post("/jobs", json=body)), "there is room again"
    )
    assert limited_stack.wait_for_end(accepted)["state"] == "SUCCESS"


async def test_a_finished_job_waits_for_room(limited_stack: Stack, client: Client) -> None:
    """Its inferer keeps the result until it can be stored; it ran once, and nobody crashed."""
    inferer = limited_stack.inferers[0]
    known = len(inferer.events("broker_awaited"))
    await _fill(client, 15_000_000)
    job_id = limited_stack.submit(prompt="go on", max_tokens=1500)
    limited_stack.wait_for_state(job_id, "STARTED")
    await _fill(client, None)
    inferer.wait_for("broker_awaited", known + 1)
    assert limited_stack.status(job_id)["state"] == "STARTED"
    await _drop(client)
    ended = limited_stack.wait_for_end(job_id)
    assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
    for process in (inferer, limited_stack.gateways[0]):
        assert "Traceback" not in process.output()
    limited_stack.wait_until_served("tiny")


async def test_large_jobs_at_once_leave_room_for_results(tmp_path: Path) -> None:
    """Of 24 requests of 3.9 MB, to two gateways at the same moment, so many are accepted that a
    store of 64 MB never runs full; each can have its result, and then there is room again."""
    with Stack(tmp_path, store="64MB") as stack:
        for _ in range(2):
            stack.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        body = {"prompt": "x" * 3_900_000, "max_tokens": 1}
        async with httpx2.AsyncClient(timeout=60) as http:
            answers = await asyncio.gather(
                *(http.post(f"{stack.urls[number % 2]}/jobs", json=body) for number in range(24))
            )
        accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code == 503]
        assert len(accepted) + len(refused) == 24
        assert 8 <= len(accepted) <= 14
        assert {answer.json()["code"] for answer in refused} == {"storage_short"}
        connection = await nats.connect(stack.nats.url)
        assert (await connection.jetstream().account_info()).storage < 60_000_000
        await connection.close()
        for job_id in accepted:  # which takes a result each
            assert stack.http.delete(f"/jobs/{job_id}").status_code == 200
        eventually(
            lambda: _accepted(stack.http.post("/jobs", json={"prompt": "x"})), "there is room again"
        )


async def _fill(client: Client, wanted: int | None) -> None:
    """Use up so many bytes of the storage; None: all of it."""
    jetstream = client.jetstream()
    await jetstream.add_stream(name="BALLAST", subjects=["ballast"])  # there already: no matter
    size = 1_000_000
    while size:
        if wanted is not None and (await jetstream.account_info()).storage >= wanted:
            return
        try:
            await jetstream.publish("ballast", bytes(size))
        except nats.js.errors.APIError:
            size //= 10


async def _drop(client: Client) -> None:
    with suppress(nats.js.errors.NotFoundError):
        await client.jetstream().delete_stream("BALLAST")


def _refusal(answer: httpx2.Response) -> httpx2.Response | None:
    return answer if answer.status_code == 503 else None


def _accepted(answer: httpx2.Response) -> Any:
    return answer.json()["id"] if answer.status_code == 202 else None
