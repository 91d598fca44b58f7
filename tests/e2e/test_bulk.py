"""Many jobs or dead letters at once, by ids or by a filter that is never empty. No inferer runs."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import DeadLetter
from tests.support.command_line import sluice
from tests.support.processes import Stack, eventually


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """NATS and a gateway that knows the models `tiny` and `other`."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.start_gateway(GATEWAY_MODELS="tiny,other").wait_for("gateway_ready")
        eventually(
            lambda: running.http.get("/jobs").json()["covers"]["complete"], "everything is listed"
        )
        yield running


def submit(gateway: Stack, count: int, **fields: Any) -> list[str]:
    return [gateway.submit(**{"prompt": "x", "model": "tiny", **fields}) for _ in range(count)]


def call(gateway: Stack, path: str, **body: Any) -> dict[str, Any]:
    answer = gateway.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def states(gateway: Stack, ids: list[str]) -> set[str]:
    return {gateway.status(job_id)["state"] for job_id in ids}


def test_jobs_that_match_are_cancelled_and_no_others(gateway: Stack) -> None:
    """Those of one user, however many pages that are; then as many as asked for."""
    mine = submit(gateway, 230, metadata={"user": "me"})
    others = submit(gateway, 3, metadata={"user": "you"})
    report = call(gateway, "/jobs/cancel", where={"metadata": {"user": "me"}}, at_most=220)
    assert report == {"matched": 230, "done": 220, "not_done": [], "left": 10}
    assert states(gateway, mine[:10]) == {"PENDING"}, "the newest are first"
    report = call(gateway, "/jobs/cancel", where={"metadata": {"user": "me"}})
    assert report == {"matched": 10, "done": 10, "not_done": [], "left": 0}
    assert states(gateway, mine) == {"REVOKED"}
    assert states(gateway, others) == {"PENDING"}
    again = call(gateway, "/jobs/cancel", where={"metadata": {"user": "me"}})
    assert again == {"matched": 0, "done": 0, "not_done": [], "left": 0}
    call(gateway, "/jobs/cancel", ids=others)


def test_jobs_are_cancelled_by_id_with_what_was_not_possible(gateway: Stack) -> None:
    (job_id,) = submit(gateway, 1)
    unknown = new_job_id()
    report = call(gateway, "/jobs/cancel", ids=[job_id, unknown, job_id])
    assert (report["matched"], report["done"], report["left"]) == (2, 1, 0)
    (left_out,) = report["not_done"]
    assert (left_out["id"], left_out["code"]) == (unknown, "job_not_found")


@pytest.mark.parametrize("path", ["/jobs/cancel", "/dead/retry", "/dead/drop"])
def test_an_empty_filter_never_means_all(gateway: Stack, path: str) -> None:
    """Nor does a body that names nothing, or something unknown."""
    (job_id,) = submit(gateway, 1)
    for body, why in (
        ({"where": {}}, "`where` must not be empty: give at least one of"),
        ({"where": {"code": None}}, "`where` must not be empty"),
        ({}, "give either `ids` or `where`"),
        ({"ids": []}, "ids must not be empty"),
        ({"ids": ["x"], "where": {"code": "x"}}, "give either `ids` or `where`"),
        ({"ids": ["x"], "at_most": 1}, "`at_most` applies only to `where`"),
        ({"where": {"user": "me"}}, "user"),
        ({"where": {"code": "x"}, "at_most": 1001}, "at_most must be at most 1000"),
    ):
        answer = gateway.http.post(path, json=body)
        assert answer.status_code == 400, (body, answer.text)
        assert why in answer.json()["detail"], (body, answer.text)
    assert states(gateway, [job_id]) == {"PENDING"}
    call(gateway, "/jobs/cancel", ids=[job_id])


def test_jobs_that_have_ended_are_not_asked_for(gateway: Stack) -> None:
    answer = gateway.http.post("/jobs/cancel", json={"where": {"state": "FAILURE"}})
    assert (answer.status_code, answer.json()["param"]) == (400, "where.state")
    assert "PENDING or STARTED or RETRY" in answer.json()["detail"]


def test_dead_letters_are_retried_and_dropped_by_their_code(gateway: Stack) -> None:
    """Those of one code and model; the new jobs say what they are retries of."""
    wanted = asyncio.run(bury(gateway, 3, "out_of_memory", "tiny"))
    others = asyncio.run(bury(gateway, 2, "model_error", "tiny"))
    others += asyncio.run(bury(gateway, 2, "out_of_memory", "other"))
    where = {"code": "out_of_memory", "model": "tiny"}
    report = call(gateway, "/dead/retry", where=where)
    assert report == {"matched": 3, "done": 3, "not_done": [], "left": 0}
    retried = gateway.http.get("/jobs", params={"via": "retry"}).json()["jobs"]
    assert {job["retry_of"] for job in retried} == set(wanted)
    assert _left(gateway) == set(others)
    report = call(gateway, "/dead/drop", where={"code": "model_error"}, at_most=1)
    assert report == {"matched": 2, "done": 1, "not_done": [], "left": 1}
    report = call(gateway, "/dead/drop", ids=[*others, "by-hand"])
    assert report["done"] == 3
    assert {one["code"] for one in report["not_done"]} == {"letter_not_found"}
    assert _left(gateway) == set()


def test_the_command_line_cancels_several(gateway: Stack) -> None:
    """By ids, with those that were not possible; and by filters, of which there must be one."""
    batch = submit(gateway, 3, metadata={"batch": "7"})
    others = submit(gateway, 2, metadata={"batch": "8"})
    unknown = new_job_id()
    some = sluice(gateway, "cancel", batch[0], unknown)
    assert (some.returncode, some.stdout) == (1, "cancelled 1 of 2\n")
    assert some.stderr.startswith(f"{unknown}: ")
    for nothing in (["cancel"], ["cancel", others[0], "--model", "tiny"]):
        wrong = sluice(gateway, *nothing)
        assert (wrong.returncode, "give either ids, or filters" in wrong.stderr) == (2, True)
    matching = ("cancel", "--metadata", "batch=7", "--state", "pending", "--since", "1h")
    first = sluice(gateway, *matching, "--at-most", "1")
    assert (first.returncode, first.stdout.splitlines()) == (
        0,
        ["cancelled 1 of 2", "left: at least 1; repeat the command"],
    )
    report = json.loads(sluice(gateway, *matching, "--json").stdout)
    assert report == {"matched": 1, "done": 1, "not_done": [], "left": 0}
    assert states(gateway, batch) == {"REVOKED"}
    assert states(gateway, others) == {"PENDING"}
    assert sluice(gateway, "cancel", *others).stdout == "cancelled 2 of 2\n"


def test_the_command_line_retries_and_drops_several(gateway: Stack) -> None:
    wanted = asyncio.run(bury(gateway, 2, "timed_out", "tiny"))
    others = asyncio.run(bury(gateway, 2, "model_error", "other"))
    retried = sluice(gateway, "dead", "retry", "--code", "timed_out", "--since", "1h")
    assert (retried.returncode, retried.stdout) == (0, "sent again 2 of 2\n")
    assert _left(gateway) == set(others)
    assert sluice(gateway, "dead", "drop", *wanted).returncode == 1
    dropped = sluice(gateway, "dead", "drop", "--model", "other")
    assert (dropped.returncode, dropped.stdout) == (0, "dropped 2 of 2\n")
    assert sluice(gateway, "dead", "drop").returncode == 2


async def bury(gateway: Stack, count: int, code: str, model: str) -> list[str]:
    """Store letters, as an inferer does; their ids."""
    ids = [new_job_id() for _ in range(count)]
    async with connected(BrokerSettings(url=gateway.nats.url), "test") as broker:
        for job_id in ids:
            letter = DeadLetter(
                id=job_id,
                model=model,
                code=code,
                message="why",
                attempts=3,
                at=timestamp(),
                request=encode(InferenceRequest(task="complete", prompt="hi")).decode(),
            )
            await broker.publish_stored(subjects.dead(model, job_id), encode(letter), {}, 5)
    return ids


def _left(gateway: Stack) -> set[str]:
    return {letter["id"] for letter in gateway.http.get("/dead?limit=200").json()["letters"]}
