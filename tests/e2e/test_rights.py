"""Rights on subjects: an inferer does all its work with rights for its own model alone, and with
them it cannot touch another model, or the queue."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from shared.broker.connection import Broker, connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.wire import subjects
from shared.wire.results import Failed
from tests.support.cramped import N_CTX, TOO_LONG, CrampedEngine
from tests.support.nats_client import flush
from tests.support.processes import Stack
from tests.support.rights import write_configuration
from tests.support.workers import dead_letter, ended, put, states, working


def url_of(stack: Stack, user: str) -> str:
    return stack.nats.url.replace("://", f"://{user}:{user}@")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Stack]:
    """A broker with rights, and a gateway."""
    with Stack(tmp_path, write_configuration(tmp_path, "tiny")) as stack:
        stack.start_gateway(NATS_URL=url_of(stack, "gateway")).wait_for("gateway_ready")
        yield stack


@asynccontextmanager
async def broker_of(stack: Stack, user: str) -> AsyncIterator[Broker]:
    async with connected(BrokerSettings(url=url_of(stack, user)), "test") as broker:
        yield broker


def violations(stack: Stack) -> list[str]:
    return [line for line in stack.nats.process.output().splitlines() if "Violation" in line]


def test_an_inferer_with_rights_for_its_model_does_all_its_work(
    guarded: Stack, tiny_model: Path
) -> None:
    guarded.start_inferer(tiny_model, NATS_URL=url_of(guarded, "inferer"))
    guarded.wait_until_served("tiny")
    body = {"prompt": "hi", "max_tokens": 3, "seed": 1}
    answer = guarded.http.post("/jobs", json=body, headers={"prefer": "wait=60"})
    assert answer.json()["state"] == "SUCCESS"
    with guarded.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        assert b"[DONE]" in stream.read()
    running = guarded.submit(prompt="hi", max_tokens=4000)
    guarded.wait_for_state(running, "STARTED")
    urgent = guarded.submit(prompt="hi", max_tokens=2, priority="high")
    assert guarded.http.delete(f"/jobs/{running}").json()["state"] == "REVOKED"
    assert guarded.wait_for_end(urgent)["state"] == "SUCCESS"
    changed = guarded.http.put("/concurrency", json={"concurrency": 2})
    assert changed.status_code == 200, changed.text
    assert guarded.inferers[0].terminate() == 0
    assert violations(guarded) == []


async def test_a_retry_and_a_dead_letter_need_no_right_to_publish_requests(
    guarded: Stack, model: Model
) -> None:
    engine: Engine = CrampedEngine(model, slots=1, n_ctx=N_CTX, n_batch=256, threads=1)
    async with broker_of(guarded, "gateway") as admin, broker_of(guarded, "inferer") as own:
        await ensure_topology(admin, Topology(), ["tiny"])
        async with working(own, engine, max_attempts=2):
            job_id = await put(admin, TOO_LONG)
            result = await ended(admin, job_id)
        assert isinstance(result, Failed)
        assert await dead_letter(admin, job_id)
        names = [name for name, _, _ in await states(admin, job_id)]
        assert names == ["started", "retrying", "started"]
    engine.close()
    assert violations(guarded) == []


FORBIDDEN = {
    "a request that wipes the queue": "infer.requests.tiny.normal.public.x",
    "a schedule": "infer.schedule.tiny.normal.public.x",
    "another model's result": "infer.results.other.x",
    "another model's state": "infer.states.other.x",
    "another model's tokens": "infer.events.other.x.tokens",
    "another model's dead letter": "infer.dead.other.x",
    "another model's entry": "$KV.INFERERS.other.x",
    "another model's retry": "infer.retry.other.x",
    "an offer to another model's inferer": "infer.handover.other.x",
    "a stored key": "$KV.IDEMPOTENCY.x",
    "another model's jobs": "$JS.API.CONSUMER.MSG.NEXT.REQUESTS.other",
    "an end of another model's job": "$JS.ACK.REQUESTS.other.1.1.1.1.0",
    "another model's limit": "$JS.API.CONSUMER.CREATE.REQUESTS.other.infer.requests.other.>",
    "any request": "$JS.API.DIRECT.GET.REQUESTS",
    "another model's result to read": "$JS.API.DIRECT.GET.RESULTS.infer.results.other.x",
    "a message that the leader deletes": "$JS.API.STREAM.MSG.DELETE.REQUESTS",
    "a purge": "$JS.API.STREAM.PURGE.REQUESTS",
    "the end of the queue": "$JS.API.STREAM.DELETE.REQUESTS",
    "a cancel": "infer.cancel.tiny.x",
    "a command": "infer.control.tiny.x",
    "a false announcement": "infer.finished.tiny.x",
}
READ_BY_GATEWAYS = ("infer.requests.>", "infer.results.>", "infer.events.>", "infer.accepted.>")


async def test_the_rights_for_one_model_reach_no_other_and_not_the_queue(guarded: Stack) -> None:
    async with broker_of(guarded, "gateway") as admin:
        waiting = await put(admin, TOO_LONG)
        refused: list[str] = []

        async def note(error: Exception) -> None:
            refused.append(str(error))

        client: Client = await nats.connect(url_of(guarded, "inferer"), error_cb=note)
        for subject in FORBIDDEN.values():
            await client.publish(subject, b"{}", headers={"Nats-Rollup": "all"})
        await flush(client)
        for subject in (
            "infer.requests.>",
            "infer.results.>",
            "infer.events.>",
            "infer.accepted.>",
        ):
            await client.subscribe(subject)
        await flush(client)
        await client.close()
        for what, subject in FORBIDDEN.items():
            assert any(f'"{subject}"'.lower() in error.lower() for error in refused), what
        assert len(refused) == len(FORBIDDEN) + len(READ_BY_GATEWAYS)
        assert await admin.subject_get(subjects.REQUESTS, subjects.request("tiny", waiting))
    assert json.loads(guarded.http.get(f"/status/{waiting}").text)["state"] == "PENDING"
