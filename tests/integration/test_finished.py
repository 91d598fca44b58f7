"""Announcements of results, and what they are worth."""

import asyncio
from typing import Any

import pytest

from services.gateway.state import result_listener
from services.gateway.state.result_listener import ResultListener
from shared.broker.connection import Broker
from shared.broker.results import store_result
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.results import Completed, Result, Usage
from tests.support.processes import PATIENCE_S


def completed(job_id: str, text: str) -> Completed:
    return Completed(
        id=job_id,
        model="tiny",
        attempt=1,
        queued_at=timestamp(),
        finished_at=timestamp(),
        text=text,
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
    )


async def test_a_forged_announcement_is_not_believed(broker: Broker) -> None:
    """Whoever may publish there can announce anything: what counts is the stored result, for who
    waits and for the ETA; an announcement without one is nothing."""
    await ensure_topology(broker, Topology(replicas=1), [])
    learned: list[Result] = []
    finished = ResultListener(broker, learned.append)
    waited_for, other, nowhere = (new_job_id() for _ in range(3))
    forged = {
        job_id: encode(completed(job_id, "forged")) for job_id in (waited_for, other, nowhere)
    }
    async with finished.listening():
        with finished.expecting("tiny", waited_for) as announced:
            for _ in range(3):
                for job_id, payload in forged.items():
                    await broker.nc.publish(subjects.finished("tiny", job_id), payload)
                await broker.nc.publish("infer.finished.tiny.x", b"\xff")
            right = completed(other, "right")
            await store_result(broker, right, PATIENCE_S)
            async with asyncio.timeout(PATIENCE_S):
                while not learned:
                    await asyncio.sleep(0.01)
            assert {result.id for result in learned} == {other}
            assert not announced.done() or announced.result() is None
        with finished.expecting("tiny", waited_for) as announced:
            wanted = completed(waited_for, "right")
            await store_result(broker, wanted, PATIENCE_S)
            async with asyncio.timeout(PATIENCE_S):
                assert await announced == wanted
    assert all(getattr(result, "text", "") == "right" for result in learned)


async def test_results_that_nobody_needs_at_once_are_read_together(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_topology(broker, Topology(replicas=1), [])
    monkeypatch.setattr(result_listener, "READ_AFTER_S", 1.0)
    read: list[list[str]] = []
    get_all = broker.direct_get_all

    async def noted(stream: str, **query: Any) -> list[StoredMessage]:
        read.append(query["multi_last"])
        return await get_all(stream, **query)

    vars(broker)["direct_get_all"] = noted
    finished = ResultListener(broker, lambda _: None)
    batches = [[completed(new_job_id(), "text") for _ in range(5)] for _ in range(2)]
    async with finished.listening(), asyncio.timeout(PATIENCE_S):
        for batch in batches:
            with finished.expecting("tiny", batch[0].id, at_once=False) as announced:
                for result in batch:
                    await store_result(broker, result, PATIENCE_S)
                    await broker.nc.flush()
                assert await announced == batch[0]
    assert read == [[subjects.result("tiny", result.id) for result in batch] for batch in batches]


async def test_a_request_that_waits_gets_its_result_at_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was announced before is read with it."""
    await ensure_topology(broker, Topology(replicas=1), [])
    monkeypatch.setattr(result_listener, "READ_AFTER_S", 2 * PATIENCE_S)
    learned: list[Result] = []
    finished = ResultListener(broker, learned.append)
    results = [completed(new_job_id(), "text") for _ in range(2)]
    async with finished.listening(), asyncio.timeout(PATIENCE_S):
        await store_result(broker, results[0], PATIENCE_S)
        with finished.expecting("tiny", results[1].id) as announced:
            await store_result(broker, results[1], PATIENCE_S)
            assert await announced == results[1]
    assert {result.id for result in learned} == {result.id for result in results}


async def test_results_that_one_answer_has_no_room_for_are_read_next(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_topology(broker, Topology(replicas=1), [])
    monkeypatch.setattr(result_listener, "READ_AFTER_S", 1.0)
    monkeypatch.setattr(result_listener, "BATCH_BYTES", 4_000)
    monkeypatch.setattr(result_listener, "LARGEST_RESULT", 2_000)
    results = [completed(new_job_id(), 1_000 * "x") for _ in range(6)]
    learned: list[Result] = []
    finished = ResultListener(broker, learned.append)
    async with finished.listening(), asyncio.timeout(PATIENCE_S):
        for result in results:
            await store_result(broker, result, PATIENCE_S)
        while len(learned) < len(results):
            await asyncio.sleep(0.01)
    assert {result.id for result in learned} == {result.id for result in results}


async def test_many_results_at_once_all_reach_their_waiters(broker: Broker) -> None:
    """Each of some hundred that are announced together reaches who waits for it."""
    await ensure_topology(broker, Topology(replicas=1), [])
    learned: list[Result] = []
    finished = ResultListener(broker, learned.append)
    results = [completed(new_job_id(), f"text {number}") for number in range(500)]

    async def wait(result: Result) -> None:
        with finished.expecting("tiny", result.id) as announced:
            await store_result(broker, result, PATIENCE_S)
            assert await announced == result

    async with finished.listening(), asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(wait(result) for result in results))
    assert {result.id for result in learned} >= {result.id for result in results[:-1]}


async def test_a_result_that_a_replica_does_not_have_yet_is_read_from_the_leader(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the request that waits for it, and for the estimates."""
    await ensure_topology(broker, Topology(replicas=1), [])
    learned: list[Result] = []
    finished = ResultListener(broker, learned.append)

    async def find_nothing(*args: object, **query: object) -> list[StoredMessage]:
        return []

    monkeypatch.setattr(broker, "direct_get_all", find_nothing)
    result = completed(new_job_id(), "right")
    async with finished.listening(), asyncio.timeout(PATIENCE_S):
        with finished.expecting("tiny", result.id) as announced:
            await store_result(broker, result, PATIENCE_S)
            assert await announced == result
    assert learned == [result]
