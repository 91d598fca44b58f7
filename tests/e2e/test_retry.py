"""Attempts that fail and are followed by others."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import httpx2
import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg
from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from services.inferer.engine.engine import Engine
from services.inferer.engine.model import Model
from services.inferer.worker.delivery import Job
from services.inferer.worker.job_store import JobStore
from services.inferer.worker.pull import Puller
from shared.broker.connection import Broker, connected
from shared.broker.results import read_result
from shared.broker.stored_messages import StoredMessage
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_request, decode_result, decode_state_event, encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import Completed, Expired, Failed
from tests.support.cramped import N_CTX, TOO_LONG, CrampedEngine
from tests.support.lora import write_lora
from tests.support.processes import Stack, clean_environment, scripts, server_sent_events
from tests.support.workers import (
    dead_letter,
    ended,
    put,
    queue_is_empty,
    scheduling_retries,
    states,
    until,
    working,
)

SHORT = InferenceRequest(task="complete", prompt="hi", max_tokens=20, seed=1)
ADAPTED = replace(SHORT, adapter="first")


@pytest.fixture
async def queue(queue: Broker) -> AsyncIterator[Broker]:
    """The queue, and what schedules retries there."""
    async with scheduling_retries(queue):
        yield queue


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    created = Engine(model, slots=1, n_ctx=N_CTX, n_batch=256, threads=1)
    yield created
    created.close()


@pytest.fixture
def adapted(tiny_model: Path, tmp_path: Path) -> Iterator[Engine]:
    write_lora(tmp_path / "first.gguf")
    model = Model(tiny_model, 0, adapters=tmp_path)
    created = Engine(model, slots=1, n_ctx=N_CTX, n_batch=256, threads=1)
    yield created
    created.close()
    model.close()


@pytest.fixture
def cramped(model: Model) -> Iterator[Engine]:
    created = CrampedEngine(model, slots=1, n_ctx=N_CTX, n_batch=256, threads=1)
    yield created
    created.close()


async def schedule_of(broker: Broker, job_id: str) -> StoredMessage | None:
    return await broker.direct_get("REQUESTS", last_by_subj=subjects.schedule_of(job_id))


async def scheduled(broker: Broker, job_id: str) -> StoredMessage:
    """The job's schedule, once it is all that the queue holds of it."""

    async def check() -> StoredMessage | None:
        if await broker.direct_get("REQUESTS", last_by_subj=subjects.request_of(job_id)):
            return None
        return await schedule_of(broker, job_id)

    found: StoredMessage = await until(check, "a schedule")
    return found


async def test_another_attempt_cures_it(queue: Broker, cramped: Engine, engine: Engine) -> None:
    """A second inferer completes what the first had no room for, as attempt 2, and its answer
    goes to whoever asked in the beginning."""
    inbox = queue.nc.new_inbox()
    replies = await queue.nc.subscribe(inbox)
    async with working(queue, cramped, "first", retry_s=1):
        job_id = await put(queue, TOO_LONG, Reply_To=inbox, traceparent="00-ab-cd-01")
        stored = await scheduled(queue, job_id)
    assert stored.data == encode(TOO_LONG)
    assert stored.headers["traceparent"] == "00-ab-cd-01"
    async with working(queue, engine, "second"):
        result = await ended(queue, job_id)
        await queue_is_empty(queue)
    assert isinstance(result, Completed)
    printed = (result.attempt, result.inferer, result.usage.completion_tokens)
    assert printed == (2, "second", 400)
    expected = [("started", 1, "first"), ("retrying", 1, "first"), ("started", 2, "second")]
    assert await states(queue, job_id) == expected
    assert decode_result((await replies.next_msg(10)).data) == result


async def test_a_job_is_dead_lettered_after_its_last_attempt(
    queue: Broker, cramped: Engine
) -> None:
    """Three attempts, then a dead letter and `failed`, both with what went wrong last; and no
    schedule takes anything of the one before but its request."""
    deadline = timestamp(datetime.now(UTC) + timedelta(hours=1))
    async with working(queue, cramped, retry_s=0.3):
        job_id = await put(queue, TOO_LONG, Deadline=deadline)
        second: StoredMessage = await until(
            lambda: _schedule_of_attempt(queue, job_id, 2), "put off for the second time"
        )
        result = await ended(queue, job_id)
        await queue_is_empty(queue)
    assert second.headers["Deadline"] == deadline
    assert "Nats-Scheduler" not in second.headers
    assert "Nats-Schedule-Next" not in second.headers
    assert isinstance(result, Failed)
    assert (result.code, result.attempt, result.inferer) == ("out_of_memory", 3, "first")
    assert "status 1" in result.message
    attempts = [(state, attempt) for state, attempt, _ in await states(queue, job_id)]
    assert attempts == [
        ("started", 1),
        ("retrying", 1),
        ("started", 2),
        ("retrying", 2),
        ("started", 3),
    ]
    letter = await dead_letter(queue, job_id)
    assert (letter.code, letter.message, letter.attempts) == (result.code, result.message, 3)
    assert decode_request(letter.request.encode()) == TOO_LONG
    assert letter.timeout_s is not None
    assert 3000 < letter.timeout_s < 3700


async def _schedule_of_attempt(broker: Broker, job_id: str, attempt: int) -> StoredMessage | None:
    stored = await schedule_of(broker, job_id)
    if stored and stored.headers["Nats-Msg-Id"].startswith(f"{job_id}/{attempt}/"):
        return stored
    return None


async def test_a_gateway_that_cannot_reach_the_broker_costs_no_attempts(
    broker: Broker, cramped: Engine
) -> None:
    """It says so, and the job is requeued with a delay; it is no dead letter."""
    await ensure_topology(broker, Topology(), ["tiny"])
    asked = asyncio.Event()

    async def refuse(message: Msg) -> None:
        asked.set()
        headers = {ERROR_HEADER: "broker_unavailable: not now", ERROR_CODE_HEADER: "503"}
        await broker.nc.publish(message.reply, b"", headers=headers)

    await broker.nc.subscribe(subjects.RETRY_WILDCARD, cb=refuse)
    async with working(broker, cramped):
        job_id = await put(broker, TOO_LONG)
        await asyncio.wait_for(asked.wait(), 60)
        await asyncio.sleep(0.5)
        assert await read_result(broker, "tiny", job_id) is None
        assert await broker.subject_get(subjects.DEAD, subjects.dead("tiny", job_id)) is None


async def test_the_reason_of_a_retry_is_in_its_event(queue: Broker, cramped: Engine) -> None:
    """The event says what went wrong."""
    async with working(queue, cramped, retry_s=300):
        job_id = await put(queue, TOO_LONG)
        await scheduled(queue, job_id)
    stored = await queue.subject_get("STATES", subjects.state("tiny", job_id))
    assert stored is not None
    event = decode_state_event(stored.data)
    assert (event.state, event.code) == ("retrying", "out_of_memory")
    assert event.message is not None


async def test_a_job_that_waits_for_its_retry_does_not_hold_up_others(
    queue: Broker, cramped: Engine
) -> None:
    """It takes no place under the limit of 1: others run meanwhile, on the same inferer."""
    async with working(queue, cramped, retry_s=300):
        job_id = await put(queue, TOO_LONG)
        await scheduled(queue, job_id)
        consumer = await queue.js.consumer_info("REQUESTS", "tiny")
        assert (consumer.num_ack_pending, consumer.num_pending) == (0, 0)
        for _ in range(2):
            assert isinstance(await ended(queue, await put(queue, SHORT)), Completed)
    assert await read_result(queue, "tiny", job_id) is None


async def test_jobs_wait_for_an_inferer_that_has_their_adapter(
    queue: Broker, engine: Engine, adapted: Engine
) -> None:
    """One without it gives them back, each time for longer, and more often than a job may fail. It
    serves others meanwhile; and the one that has the adapter completes them, at their first
    attempt."""
    async with working(queue, engine, "without", retry_s=0.01):
        waiting = [await put(queue, ADAPTED) for _ in range(5)]
        for job_id in waiting:
            await until(partial(_returns, queue, job_id, 4), "returned four times")
        assert isinstance(await ended(queue, await put(queue, SHORT)), Completed)
        assert await read_result(queue, "tiny", waiting[0]) is None
        async with working(queue, adapted, "with"):
            results = [await ended(queue, job_id) for job_id in waiting]
            await queue_is_empty(queue)
    assert [(type(result), result.attempt) for result in results] == [(Completed, 1)] * 5
    assert {result.inferer for result in results} == {"with"}
    assert (await queue.js.stream_info("DEAD")).state.messages == 0
    *returned, started = await states(queue, waiting[0])
    assert set(returned) == {("returned", 1, "without")}
    assert started == ("started", 1, "with")


async def test_a_job_whose_adapter_no_inferer_has_ends_at_its_deadline(
    queue: Broker, engine: Engine
) -> None:
    """Not before, although the next pause would be longer."""
    deadline = timestamp(datetime.now(UTC) + timedelta(seconds=2))
    async with working(queue, engine, retry_s=300):
        result = await ended(queue, await put(queue, ADAPTED, Deadline=deadline))
        await queue_is_empty(queue)
    assert isinstance(result, Expired)
    assert (result.code, result.attempt) == ("deadline_passed", 0)
    assert result.finished_at >= deadline


async def test_a_job_that_may_have_killed_its_inferer_runs_alone_after_a_return(
    queue: Broker, engine: Engine, adapted: Engine
) -> None:
    """The one without its adapter leaves the start that nothing followed as it is."""
    job_id = await put(queue, ADAPTED)
    async with Puller(queue, "tiny") as puller:
        message = await puller.next()
    job = Job(message, queue.now)
    job.start(N_CTX)
    await JobStore(queue, "lost").announce_start(job)
    await message.nak()
    async with working(queue, engine, "without"):

        async def delivered_twice() -> bool:
            consumer = await queue.js.consumer_info("REQUESTS", "tiny")
            return bool(consumer.delivered and consumer.delivered.consumer_seq >= 3)

        await until(delivered_twice, "it came back")
    async with working(queue, adapted, "with"):
        result = await ended(queue, job_id)
    assert (type(result), result.attempt) == (Completed, 2)
    assert await states(queue, job_id) == [("started", 1, "lost"), ("started", 2, "with")]


async def _returns(broker: Broker, job_id: str, count: int) -> bool:
    stored = await broker.subject_get("STATES", subjects.state("tiny", job_id))
    return stored is not None and decode_state_event(stored.data).returns >= count


async def test_a_job_without_time_for_another_attempt_expires(
    queue: Broker, cramped: Engine
) -> None:
    """Where the deadline comes before the next attempt the job expires at once, and says why."""
    deadline = timestamp(datetime.now(UTC) + timedelta(seconds=60))
    async with working(queue, cramped, retry_s=300):
        result = await ended(queue, await put(queue, TOO_LONG, Deadline=deadline))
        await queue_is_empty(queue)
    assert isinstance(result, Expired)
    assert (result.code, result.attempt) == ("timed_out", 1)
    assert "no time is left" in result.message
    assert "status 1" in result.message


async def test_an_inferer_lost_between_schedule_and_ack_doubles_no_job(
    queue: Broker, engine: Engine
) -> None:
    """The message comes again while its schedule waits: it is not run now, but once, later."""
    job_id = await put(queue, SHORT)
    async with Puller(queue, "tiny") as puller:
        message = await puller.next()
    job, store = Job(message, queue.now), JobStore(queue, "lost")
    again_at = datetime.now(UTC) + timedelta(seconds=1.5)
    await store.announce_retry(job, "model_error", "as an inferer that is then lost")
    assert await store.schedule(job, again_at)
    await message.nak()
    async with working(queue, engine):
        await scheduled(queue, job_id)
        assert await states(queue, job_id) == [("retrying", 1, "lost")]
        result = await ended(queue, job_id)
        await queue_is_empty(queue)
    assert isinstance(result, Completed)
    assert result.attempt == 2
    assert str(result.started_at) >= timestamp(again_at)
    assert await states(queue, job_id) == [("retrying", 1, "lost"), ("started", 2, "first")]


async def test_a_retry_without_a_gateway_is_made_soon_and_stops_no_queue(
    broker: Broker, cramped: Engine
) -> None:
    """Nobody schedules it. It stays on the queue, delayed for some seconds, in the only place that
    its queue has; then it is tried again, and the others follow."""
    await ensure_topology(broker, Topology(), ["tiny"])
    async with working(broker, cramped, retry_s=300, max_attempts=2):
        failing = await put(broker, TOO_LONG)
        others = [await put(broker, SHORT) for _ in range(2)]
        results = [await ended(broker, job_id) for job_id in (failing, *others)]
        await queue_is_empty(broker)
    assert [(type(result), result.attempt) for result in results] == [
        (Failed, 2),
        (Completed, 1),
        (Completed, 1),
    ]
    printed = [(state, attempt) for state, attempt, _ in await states(broker, failing)]
    assert printed == [("started", 1), ("retrying", 1), ("started", 2)]


async def test_an_inferer_lost_between_letter_and_result_leaves_one_letter(
    queue: Broker, cramped: Engine, engine: Engine
) -> None:
    """The letter was written by an inferer that was then lost: the result says what it says."""
    job_id = await put(queue, TOO_LONG)
    async with working(queue, cramped, max_attempts=1):
        await ended(queue, job_id)
        await queue_is_empty(queue)
    letter = await dead_letter(queue, job_id)
    await queue.js.purge_stream("RESULTS")
    await queue.publish_stored(subjects.request("tiny", job_id), encode(TOO_LONG), {}, 5)
    async with Puller(queue, "tiny") as puller:
        await (await puller.next()).nak()
    async with working(queue, engine, max_attempts=1):
        result = await ended(queue, job_id)
    assert isinstance(result, Failed)
    assert (result.code, result.message, result.attempt) == (letter.code, letter.message, 1)
    assert await dead_letter(queue, job_id) == letter


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[tuple[Stack, Broker]]:
    """NATS and a gateway as processes, and a connection for a worker in this one."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        async with connected(BrokerSettings(stack.nats.url), "worker") as broker:
            yield stack, broker


async def test_clients_see_a_retry_and_the_text_goes_on(
    gateway: tuple[Stack, Broker], cramped: Engine, engine: Engine
) -> None:
    """RETRY with its attempts; the events say that an attempt failed, and the text of the next,
    which comes out the same, goes on where that one ended."""
    stack, broker = gateway
    body = {"prompt": "tell me", "max_tokens": 400, "temperature": 0, "seed": 1}
    async with working(broker, cramped, "first", retry_s=2):
        job_id = await asyncio.to_thread(stack.submit, **body)
        status = await asyncio.to_thread(stack.wait_for_state, job_id, "RETRY")
        assert (status["attempts"], status["result"], status["error"]) == (1, None, None)
        assert status["last_error"]["code"] == "out_of_memory"
        printed = await asyncio.to_thread(_printed_status, stack.url, job_id)
        assert f"last error  out_of_memory: {status['last_error']['message']}\n" in printed
        reading = asyncio.create_task(asyncio.to_thread(_events, stack.url, job_id))
        await scheduled(broker, job_id)
    async with working(broker, engine, "second"):
        events = await reading
    status = await asyncio.to_thread(stack.status, job_id)
    assert (status["state"], status["attempts"]) == ("SUCCESS", 2)
    assert "last_error" not in status
    names = [event["event"] for event in events if event["event"] != "tokens"]
    assert names == ["queued", "started", "attempt_failed", "started", "result"]
    tokens = [json.loads(event["data"]) for event in events if event["event"] == "tokens"]
    assert "".join(token["text"] for token in tokens) == status["result"]["text"]


async def test_an_openai_stream_goes_on_over_a_retry(
    gateway: tuple[Stack, Broker], cramped: Engine, engine: Engine
) -> None:
    """It has no word for it and needs none: the same text, to its end."""
    stack, broker = gateway
    body = {"prompt": "tell me", "max_tokens": 400, "temperature": 0, "seed": 1}
    async with working(broker, cramped, "first", retry_s=2):
        streaming = asyncio.create_task(asyncio.to_thread(_completion, stack.url, body))
        await until(lambda: _any_schedule(broker), "put off")
    async with working(broker, engine, "second"):
        streamed = await streaming
        job_id = await asyncio.to_thread(stack.submit, **body)
        whole = await asyncio.to_thread(stack.wait_for_end, job_id)
    assert streamed == whole["result"]["text"]


async def test_a_job_that_waits_for_its_retry_can_be_cancelled(
    gateway: tuple[Stack, Broker], cramped: Engine
) -> None:
    """Its schedule is deleted: nothing of it is left on the queue."""
    stack, broker = gateway
    async with working(broker, cramped, retry_s=300):
        job_id = await asyncio.to_thread(stack.submit, prompt="tell me", max_tokens=400)
        await scheduled(broker, job_id)
        await ended(broker, await put(broker, SHORT))  # delivered later than the job was put off
        answer = await asyncio.to_thread(stack.http.delete, f"/jobs/{job_id}")
    assert answer.status_code == 200
    assert (answer.json()["state"], answer.json()["attempts"]) == ("REVOKED", 1)
    assert (await broker.js.stream_info("REQUESTS")).state.messages == 0


async def _any_schedule(broker: Broker) -> StoredMessage | None:
    return await broker.direct_get("REQUESTS", last_by_subj="infer.schedule.>")


def _printed_status(url: str, job_id: str) -> str:
    """What `sluice status` prints of an unfinished job, with exit status 0."""
    command = [str(scripts() / "sluice"), "status", job_id, "--url", url]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=True
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def _events(url: str, job_id: str) -> list[dict[str, str]]:
    with httpx2.stream("GET", f"{url}/jobs/{job_id}/events", timeout=60) as response:
        return list(server_sent_events(response))


def _completion(url: str, body: dict[str, object]) -> str:
    body = {**body, "model": "tiny", "stream": True}
    text = ""
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for event in server_sent_events(response):
            if event["data"] != "[DONE]":
                chunk = json.loads(event["data"])
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"]
    return text
