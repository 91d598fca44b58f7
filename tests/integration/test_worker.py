"""The worker in this process: a real broker, the real engine with the tiny model."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import replace

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.worker import executor
from services.inferer.worker.lease import requeue
from services.inferer.worker.pull import Puller
from shared.broker.connection import Broker, connected
from shared.broker.consumers import ensure_consumers
from shared.broker.results import read_result, store_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_result, decode_token_frame, encode
from shared.wire.events import CancelNotice, StateEvent
from shared.wire.requests import InferenceRequest
from shared.wire.results import Cancelled, Completed, Expired, Failed, Usage
from tests.support.nats_client import flush
from tests.support.processes import CONFIGURATION, NatsServer
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

N_CTX = 8192
ENDLESS = InferenceRequest(
    task="complete", prompt="tell me", seed=1
)  # a minute of work, never waited for
LONG = InferenceRequest(
    task="complete", prompt="tell me", max_tokens=800, seed=1
)  # seconds of work
SHORT = InferenceRequest(task="complete", prompt="hi", max_tokens=60)


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    created = Engine(model, slots=2, n_ctx=N_CTX, n_batch=256, threads=1)
    yield created
    created.close()


async def inbox_of(broker: Broker) -> tuple[str, Any]:
    inbox = broker.nc.new_inbox()
    return inbox, await broker.nc.subscribe(inbox)


async def received(broker: Broker, subscription: Any) -> list[bytes]:
    """Everything that was published before."""
    await flush(broker.nc)
    return [(await subscription.next_msg(5)).data for _ in range(subscription.pending_msgs)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_job_gets_its_result_its_events_and_its_reply(
    queue: Broker, engine: Engine, stream: bool
) -> None:
    """Result, reply, state event and tokens agree, and the message is off the queue."""
    inbox, replies = await inbox_of(queue)
    events = await queue.nc.subscribe("infer.events.*.*.tokens")
    request = replace(SHORT, metadata=Raw(b'{"k": 1}'), retry_of="old", stream=stream)
    async with working(queue, engine):
        job_id = await put(queue, request, Reply_To=inbox)
        await queue_is_empty(queue)
    result = await read_result(queue, "tiny", job_id)
    assert isinstance(result, Completed)
    printed = (result.id, result.model, result.attempt, result.inferer)
    assert printed == (job_id, "tiny", 1, "first")
    assert (result.owner, result.metadata, result.retry_of) == ("public", Raw(b'{"k": 1}'), "old")
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 60)
    assert result.queued_at <= str(result.started_at) <= result.finished_at
    assert await states(queue, job_id) == [("started", 1, "first")]

    frames, tokens = await received(queue, events), list[str]()
    for frame in map(decode_token_frame, frames):
        assert (frame.attempt, frame.index) == (1, len(tokens))
        tokens += frame.tokens
    assert "".join(tokens) == result.text
    # Who asked for a stream gets the frames first, and an empty message as its end.
    expected = [*frames, encode(result), b""] if stream else [encode(result)]
    assert await received(queue, replies) == expected


async def test_a_job_takes_five_messages_besides_its_pulls(
    queue: Broker, engine: Engine, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start, for readers and for later attempts, its token, its result, its acknowledgement."""
    monkeypatch.setattr(executor, "CHECK_AFTER_S", 60)
    sent: list[str] = []
    async with connected(BrokerSettings(nats_server.url), "own") as own:
        publish = own.nc.publish

        async def noted(subject: str, *rest: Any, **named: Any) -> None:
            if ".MSG.NEXT." not in subject and not subject.startswith("$SYS."):
                sent.append(subject)
            await publish(subject, *rest, **named)

        vars(own.nc)["publish"] = noted  # a request publishes, too
        async with working(own, engine):
            job_id = await put(queue, replace(SHORT, max_tokens=1))
            await queue_is_empty(queue)
    assert sent[0] == subjects.state_events("tiny", job_id)
    # Two tasks publish them.
    assert {*sent[1:3]} == {subjects.state("tiny", job_id), subjects.token_events("tiny", job_id)}
    assert sent[3] == subjects.result("tiny", job_id)
    assert len(sent) == 5
    assert sent[-1].startswith("$JS.ACK.REQUESTS.tiny.")


async def test_a_reply_that_is_lost_with_its_connection_is_sent_again(
    queue: Broker, engine: Engine, nats_server: NatsServer
) -> None:
    """It goes out with the acknowledgement, so both are lost, and both are repeated."""
    inbox, replies = await inbox_of(queue)
    await flush(queue.nc)
    async with connected(BrokerSettings(nats_server.url), "own") as own:
        publish = own.nc.publish

        async def lost(subject: str, *rest: Any, **named: Any) -> None:
            await publish(subject, *rest, **named)
            if subject.startswith("$JS.ACK.") and not own.nc.stats["reconnects"]:
                await own.nc.force_reconnect()

        vars(own.nc)["publish"] = lost
        async with working(own, engine):
            job_id = await put(queue, SHORT, Reply_To=inbox)
            await queue_is_empty(queue)
        await flush(own.nc)
    result = await read_result(queue, "tiny", job_id)
    assert isinstance(result, Completed)
    assert own.nc.stats["reconnects"] == 1
    assert await received(queue, replies) == [encode(result)]


async def test_a_start_is_stored_before_the_first_token(
    queue: Broker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the engine has the first tokens before the event loop goes on."""
    submit = engine.submit

    def submit_and_wait(sequence: GenerationSequence) -> None:
        submit(sequence)
        give_up_at = time.monotonic() + 60
        while sequence.completion_tokens < 2:
            assert time.monotonic() < give_up_at
            time.sleep(0.001)

    monkeypatch.setattr(engine, "submit", submit_and_wait)
    async with working(queue, engine):
        job_id = await put(queue, SHORT)
        await queue_is_empty(queue)
    first = await queue.direct_get("EVENTS", seq=1, next_by_subj=subjects.events("tiny", job_id))
    assert first is not None
    assert first.subject == subjects.state_events("tiny", job_id)


@pytest.mark.parametrize("size", [1, 5_000_000])
async def test_a_message_that_is_not_a_request_is_dead_lettered(
    queue: Broker, engine: Engine, size: int
) -> None:
    """Dead letter, `failed`, a reply, and the queue goes on; also one that grows when quoted."""
    inbox, replies = await inbox_of(queue)
    async with working(queue, engine):
        job_id = await put(queue, b'"' * size, Reply_To=inbox)
        assert isinstance(await ended(queue, await put(queue, SHORT)), Completed)
        await queue_is_empty(queue)
    result = await read_result(queue, "tiny", job_id)
    assert isinstance(result, Failed)
    assert (result.code, result.attempt, result.started_at) == ("invalid_request", 0, None)
    assert [decode_result(reply) for reply in await received(queue, replies)] == [result]
    assert await states(queue, job_id) == []
    letter = await dead_letter(queue, job_id)
    assert (letter.code, letter.attempts, letter.request[:1]) == ("invalid_request", 0, '"')


async def test_an_invalid_reply_subject_does_no_harm(queue: Broker, engine: Engine) -> None:
    """The job has its result, the inferer lives, and the queue goes on."""
    async with working(queue, engine):
        job_id = await put(queue, replace(SHORT, stream=True), Reply_To="_INBOX.a b")
        assert isinstance(await ended(queue, job_id), Completed)
        await queue_is_empty(queue)


async def test_a_job_that_has_a_result_is_broken_off(queue: Broker, engine: Engine) -> None:
    """However long it would run: it is off the queue, and its requester has the stored result."""
    inbox, replies = await inbox_of(queue)
    job_id = await put(queue, ENDLESS, Reply_To=inbox)
    common: dict[str, Any] = {"queued_at": timestamp(), "finished_at": timestamp(), "attempt": 1}
    answer: dict[str, Any] = {"text": "x", "finish_reason": "stop", "usage": Usage(1, 2, 3)}
    stored = Completed(id=job_id, model="tiny", **common, **answer)
    await store_result(queue, stored, 5)
    async with working(queue, engine):
        await queue_is_empty(queue)
    assert [decode_result(reply) for reply in await received(queue, replies)] == [stored]


async def test_a_job_ends_at_its_deadline_waiting_or_running(queue: Broker, engine: Engine) -> None:
    """One that passed in the queue: never started; one that passes in the run: broken off."""
    passed = await put(queue, ENDLESS, Deadline="2026-01-31T12:00:00.000000Z")
    async with working(queue, engine):
        waited = await ended(queue, passed)
        soon = timestamp(datetime.now(UTC) + timedelta(seconds=1))
        ran = await ended(queue, await put(queue, ENDLESS, Deadline=soon))
    assert isinstance(waited, Expired)
    assert (waited.code, waited.attempt, waited.started_at) == ("deadline_passed", 0, None)
    assert await states(queue, passed) == []
    assert isinstance(ran, Expired)
    assert (ran.code, ran.attempt, ran.inferer) == ("timed_out", 1, "first")


async def test_a_job_that_kills_its_inferers_is_dead_lettered(
    queue: Broker, engine: Engine
) -> None:
    """After three starts it is not started again: `worker_lost`, and a dead letter."""
    job_id = await put(queue, SHORT)
    for attempt in (1, 2, 3):
        event = StateEvent(state="started", attempt=attempt, at=timestamp(), inferer="dead")
        await queue.js.publish(subjects.state("tiny", job_id), encode(event))
    async with Puller(queue, "tiny") as puller:
        await (await puller.next()).nak()  # the broker, too, has seen it delivered before
    async with working(queue, engine):
        await queue_is_empty(queue)
    result = await read_result(queue, "tiny", job_id)
    assert isinstance(result, Failed)
    assert (result.code, result.attempt) == ("worker_lost", 3)
    letter = await dead_letter(queue, job_id)
    assert (letter.code, letter.attempts) == ("worker_lost", 3)
    assert msgspec.json.decode(letter.request, type=InferenceRequest) == SHORT
    assert await states(queue, job_id) == []


async def test_a_cancel_stops_a_job_that_runs(queue: Broker, engine: Engine) -> None:
    """The notice's code becomes the result's; the next job runs."""
    async with working(queue, engine):
        job_id = await put(queue, ENDLESS)
        await until(lambda: states(queue, job_id), "started")
        await queue.nc.publish(
            subjects.cancel("tiny", job_id), encode(CancelNotice("client_disconnected"))
        )
        result = await ended(queue, job_id)
        assert isinstance(await ended(queue, await put(queue, SHORT)), Completed)
    assert isinstance(result, Cancelled)
    assert (result.code, result.attempt) == ("client_disconnected", 1)


async def test_a_prompt_longer_than_the_context_is_refused(queue: Broker, engine: Engine) -> None:
    """It can never run: `failed`, with both numbers, and no dead letter."""
    async with working(queue, engine):
        job_id = await put(queue, replace(SHORT, prompt="word " * N_CTX))
        result = await ended(queue, job_id)
    assert isinstance(result, Failed)
    assert result.code == "prompt_too_long"
    assert f"{N_CTX + 1} tokens" in result.message
    assert f"only {N_CTX}" in result.message
    assert (await queue.js.stream_info("DEAD")).state.messages == 0


@pytest.mark.parametrize("limit", [1, 2])
async def test_the_consumers_limit_is_how_many_run_at_once(
    queue: Broker, engine: Engine, limit: int
) -> None:
    """Two slots: with a limit of 2 two jobs overlap, with 1 the broker keeps the second back."""
    await ensure_consumers(queue, Topology().ack_wait_s, "tiny", limit=limit, facts=None)
    ids = [await put(queue, replace(LONG, max_tokens=150)) for _ in range(2)]
    async with working(queue, engine, concurrency=2):
        results = [await ended(queue, job_id) for job_id in ids]
    first, second = sorted(results, key=lambda result: str(result.started_at))
    assert (str(second.started_at) < first.finished_at) == (limit == 2)
    assert isinstance(first, Completed)
    assert isinstance(second, Completed)
    if limit == 1:
        assert first.text == second.text
    else:  # what else is in a batch changes the last bits of its numbers, and so, later, a token
        assert first.text[:100] == second.text[:100]


async def test_slots_that_close_and_open_again_run_no_more_than_there_are(
    queue: Broker, engine: Engine
) -> None:
    """A slot that closes while its job runs is the one that opens again: no second job beside it,
    though the broker would deliver one of another priority."""
    async with working(queue, engine) as (worker, _):
        first = await put(queue, LONG)
        await until(lambda: states(queue, first), "started")
        await worker.set_slots(0)
        await worker.set_slots(1)
        assert (worker.slots, worker.busy) == (1, 1)
        second = new_job_id()
        await queue.publish_stored(subjects.request("tiny", second, "high"), encode(SHORT), {}, 5)
        results = [await ended(queue, job_id) for job_id in (first, second)]
        assert worker.slots == 1
    assert str(results[1].started_at) >= results[0].finished_at


async def finished_by_another(queue: Broker, engine: Engine, job_id: str) -> None:
    """A job that was requeued: the next inferer finishes it, as the same attempt."""
    assert await read_result(queue, "tiny", job_id) is None

    async def begun() -> bool:
        return ("started", 1, "second") in await states(queue, job_id)

    async with working(queue, engine, "second"):
        async with asyncio.timeout(9):  # less than a lease, so it was really requeued
            await until(begun, "started by the second")
        result = await ended(queue, job_id)
        await queue_is_empty(queue)
    assert isinstance(result, Completed)
    assert (result.inferer, result.attempt) == ("second", 1)


async def test_a_running_job_without_grace_is_requeued_and_costs_no_attempt(
    queue: Broker, engine: Engine
) -> None:
    """Without grace it is requeued, which does not count as an attempt."""
    async with working(queue, engine, grace_s=0):
        job_id = await put(queue, LONG)
        await until(lambda: states(queue, job_id), "started")
    printed = [("started", 1, "first"), ("returned", 1, "first")]
    assert await states(queue, job_id) == printed
    await finished_by_another(queue, engine, job_id)
    assert await states(queue, job_id) == [*printed, ("started", 1, "second")]


async def test_a_job_being_examined_when_the_inferer_stops_is_requeued(
    queue: Broker, engine: Engine, nats_server: NatsServer
) -> None:
    """Before its start, while the broker is slow: requeued too, not cancelled."""
    job_id = await put(queue, SHORT)
    async with Puller(queue, "tiny") as puller:
        message = await puller.next()
    async with working(queue, engine, concurrency=0, grace_s=0) as (worker, _):
        nats_server.process.popen.send_signal(signal.SIGSTOP)
        processing = asyncio.create_task(worker.process(message))
        async with asyncio.timeout(30):
            while not worker.busy:
                await asyncio.sleep(0)
    nats_server.process.popen.send_signal(signal.SIGCONT)
    await processing
    await finished_by_another(queue, engine, job_id)


async def test_a_job_that_arrives_as_the_inferer_stops_is_requeued(
    queue: Broker, engine: Engine, nats_server: NatsServer
) -> None:
    """In the same moment: it is not begun beyond the grace, but goes to another at once."""
    async with connected(BrokerSettings(nats_server.url), "own") as own:
        async with working(own, engine, grace_s=0) as (_, stopping):
            await until(lambda: _pulls(queue), "a pull")
            before = own.nc.stats["in_msgs"]
            job_id = await put(queue, LONG)
            async with asyncio.timeout(30):
                while own.nc.stats["in_msgs"] == before:
                    await asyncio.sleep(0)
            stopping.set()
        await finished_by_another(queue, engine, job_id)


async def test_a_job_requeued_during_an_outage_is_free_as_soon_as_it_is_over(
    queue: Broker, nats_server: NatsServer
) -> None:
    """It waits for the broker, and then the message is free at once, not when its lease is over."""
    await put(queue, SHORT)
    async with connected(BrokerSettings(nats_server.url), "own") as own:
        async with Puller(own, "tiny") as puller:
            message = await puller.next()
        # In good order: killed, it might not have written down yet that this is delivered.
        await asyncio.to_thread(nats_server.process.terminate)
        async with asyncio.timeout(30):
            while own.is_connected:
                await asyncio.sleep(0.01)
        handing_back = asyncio.create_task(requeue(message))
        await asyncio.to_thread(nats_server.start)
        await handing_back
    async with asyncio.timeout(30):
        while not queue.is_connected:
            await asyncio.sleep(0.01)
    info = await queue.js.consumer_info("REQUESTS", "tiny")
    sequence = message.metadata.sequence.stream
    assert (info.delivered and info.delivered.stream_seq, info.num_ack_pending) == (sequence, 1)
    async with asyncio.timeout(9), Puller(queue, "tiny") as puller:  # a lease takes longer
        assert (await puller.next()).metadata.num_delivered == 2


async def test_a_requeued_job_is_free_after_a_restart_of_the_broker(
    queue: Broker, engine: Engine, nats_server: NatsServer
) -> None:
    """When the whole stack is stopped and started again, nobody waits for the end of a lease."""
    async with working(queue, engine, grace_s=0):
        job_id = await put(queue, LONG)
        await until(lambda: states(queue, job_id), "started")
    # The broker writes it down within 100 ms, and nothing shows when it has.
    await asyncio.sleep(0.5)
    await asyncio.to_thread(nats_server.process.terminate)
    await asyncio.to_thread(nats_server.start)
    async with asyncio.timeout(30):
        while not queue.is_connected:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(5), Puller(queue, "tiny") as puller:
        assert (await puller.next()).metadata.num_delivered == 2


async def _pulls(broker: Broker) -> int:
    return (await broker.js.consumer_info("REQUESTS", "tiny")).num_waiting or 0


async def test_a_job_outlives_a_broker_that_is_killed(
    queue: Broker, engine: Engine, nats_server: NatsServer
) -> None:
    """kill -9 and a restart during the run: the result is stored all the same, as attempt 1."""
    async with working(queue, engine):
        job_id = await put(queue, LONG)
        await until(lambda: states(queue, job_id), "started")
        nats_server.process.kill()
        await asyncio.to_thread(nats_server.start)
        async with asyncio.timeout(60):
            while not queue.is_connected:
                await asyncio.sleep(0.01)
        result = await ended(queue, job_id)
        await queue_is_empty(queue)
    assert isinstance(result, Completed)
    assert (result.usage.completion_tokens, result.attempt) == (800, 1)


MEGABYTE = 900_000


@pytest.mark.parametrize(
    "body",
    [
        {"task": "complete", "prompt": "hi", "retry_of": "A" * MEGABYTE},
        {"task": "A" * MEGABYTE, "prompt": "hi"},
        {"task": "complete", "prompt": "hi", "max_tokens": 3, "model": "A" * MEGABYTE},
    ],
    ids=["retry_of", "task", "model"],
)
async def test_a_long_value_ends_its_job_alone(
    tmp_path: Path, engine: Engine, body: dict[str, object]
) -> None:
    """Whatever is quoted of it fits into its result and its letter."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text(CONFIGURATION.read_text().replace("8MB", "1MB"))
    with NatsServer(tmp_path / "nats", configuration) as server:
        async with connected(BrokerSettings(url=server.url), "test") as queue:
            await ensure_topology(queue, Topology(), ["tiny"])
            async with scheduling_retries(queue), working(queue, engine):
                job_id = await put(queue, json.dumps(body).encode())
                assert await ended(queue, job_id)
                assert await ended(queue, await put(queue, SHORT))
                await queue_is_empty(queue)


async def test_a_stream_of_events_that_takes_nothing_does_not_stop_the_queue(
    queue: Broker, engine: Engine
) -> None:
    """Only readers need it."""
    await queue.js.delete_stream(subjects.EVENTS)
    async with working(queue, engine):
        for _ in range(2):
            assert await ended(queue, await put(queue, SHORT))
        await queue_is_empty(queue)


@pytest.mark.parametrize("shares_cache", [False, True])
async def test_prompts_of_one_owner_speed_up_those_of_others_only_if_allowed(
    queue: Broker, model: Model, shares_cache: bool
) -> None:
    engine = Engine(
        model,
        slots=1,
        n_ctx=N_CTX,
        n_batch=256,
        threads=1,
        cache_bytes=2**20,
        shares_cache=shares_cache,
    )
    request = InferenceRequest(task="complete", prompt="tell me more " * 50, max_tokens=2)
    cached = []
    async with working(queue, engine):
        for owner in ("ann", "bob", "ann"):
            job_id = new_job_id()
            subject = subjects.request("tiny", job_id, owner=owner)
            await queue.publish_stored(subject, encode(request), {}, 5)
            result = await ended(queue, job_id)
            assert isinstance(result, Completed)
            cached.append(result.usage.prompt_tokens_details.cached_tokens > 0)
    engine.close()
    assert cached == [False, shares_cache, True]


async def test_a_second_attempt_computes_its_prompt_whole(queue: Broker, model: Model) -> None:
    """Whatever made the first one fail may be in what was reused."""
    engine = Engine(model, slots=1, n_ctx=N_CTX, n_batch=256, threads=1, cache_bytes=2**20)
    request = InferenceRequest(task="complete", prompt="tell me more " * 50, max_tokens=2)
    async with working(queue, engine):
        await ended(queue, await put(queue, request))
    again = await put(queue, request)
    async with Puller(queue, "tiny") as puller:
        message = await puller.next()
        event = StateEvent(state="retrying", attempt=1, at=timestamp(), inferer="another")
        await queue.publish_stored(subjects.state("tiny", again), encode(event), {}, 5)
        await message.nak()
    async with working(queue, engine):
        result = await ended(queue, again)
    engine.close()
    assert isinstance(result, Completed)
    assert (result.attempt, result.usage.prompt_tokens_details.cached_tokens) == (2, 0)
