"""Readers who take up a stream of events that the broker has lost a part of."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import nats.js.errors
import pytest
from nats.js.api import StreamConfig

from shared.broker.connection import Broker, connected
from shared.broker.results import store_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import StateEvent, TokenFrame
from shared.wire.results import Completed, Usage
from tests.support.processes import PATIENCE_S, Stack, server_sent_events

Event = dict[str, str]

FRAMES = {
    "one attempt": [(1, 0, ["a"]), (1, 1, ["b", "c"]), (1, 3, ["d"])],
    "a second that repeats the first": [(1, 0, ["a", "b", "c"]), (2, 0, ["a"]), (2, 1, ["b"])],
    "a second that differs": [(1, 0, ["a", "b"]), (2, 0, ["a"]), (2, 1, ["x"])],
}


@pytest.fixture
async def broker(shared_stack: Stack) -> AsyncIterator[Broker]:
    async with connected(BrokerSettings(url=shared_stack.nats.url), "test") as connection:
        yield connection


async def _finished_job(
    broker: Broker, frames: list[tuple[int, int, list[str]]], text: str | None = None
) -> str:
    """The id of a job with these token frames, whose answer is ``text``; by default "abcdef", or
    "axcdef"."""
    job_id = new_job_id()
    await _publish_events(broker, job_id, frames)
    result = Completed(
        id=job_id,
        model="tiny",
        attempt=frames[-1][0],
        queued_at=timestamp(),
        finished_at=timestamp(),
        text=text or ("axcdef" if "x" in frames[-1][2] else "abcdef"),
        finish_reason="stop",
        usage=Usage(1, 6, 7),
    )
    await store_result(broker, result, PATIENCE_S)
    return job_id


async def _publish_events(
    broker: Broker, job_id: str, frames: list[tuple[int, int, list[str]]]
) -> None:
    attempt = 0
    for number, index, tokens in frames:
        if number > attempt:
            attempt = number
            started = StateEvent(state="started", attempt=attempt, at=timestamp(), inferer="x")
            await broker.js.publish(subjects.state_events("tiny", job_id), encode(started))
        frame = TokenFrame(attempt=number, index=index, tokens=tokens)
        await broker.js.publish(subjects.token_events("tiny", job_id), encode(frame))


@pytest.mark.parametrize("attempts", FRAMES)
async def test_a_stream_goes_on_after_its_events_were_purged(
    shared_stack: Stack, broker: Broker, attempts: str
) -> None:
    """Wherever a reader was cut off and however much is gone: what follows makes the whole text,
    and nothing comes twice without `retrying` before it."""
    job_id = await _finished_job(broker, FRAMES[attempts])
    whole = await asyncio.to_thread(_events, shared_stack, job_id)
    text = _text(whole)
    assert text in ("abcdef", "axcdef")
    for _ in range(1 + await _stored(broker, job_id)):
        for cut in range(len(whole)):
            after = whole[cut - 1]["id"] if cut else ""
            rest = await asyncio.to_thread(_events, shared_stack, job_id, after)
            assert _text(whole[:cut] + rest) == text, f"cut off after {after}"
            assert rest[-1]["event"] == "result"
        left = max(await _stored(broker, job_id) - 1, 0)
        await broker.js.purge_stream(
            subjects.EVENTS, subject=subjects.events("tiny", job_id), keep=left
        )


async def test_a_stream_goes_on_with_other_sequences(shared_stack: Stack, broker: Broker) -> None:
    """A node whose disk was full can have an event at another sequence than the others: the text
    that a reader has is neither repeated nor cut short, wherever the same events are by then."""
    frames = FRAMES["one attempt"]
    job_id = await _finished_job(broker, frames)
    whole = await asyncio.to_thread(_events, shared_stack, job_id)
    stored = await _stored(broker, job_id)
    first = (await broker.js.stream_info(subjects.EVENTS)).state.last_seq - stored + 1
    config = (await broker.js.stream_info(subjects.EVENTS)).config
    for moved in range(-stored, stored + 1):
        await _replace_events(broker, config.evolve(first_seq=first + moved))
        await _publish_events(broker, job_id, frames)
        for cut in range(1, len(whole)):
            rest = await asyncio.to_thread(_events, shared_stack, job_id, whole[cut - 1]["id"])
            assert _text(whole[:cut] + rest) == "abcdef", f"moved by {moved}, cut off at {cut}"
            kinds = [event["event"] for event in whole[:cut] + rest]
            assert "retrying" not in kinds
            assert kinds.count("started") == 1


async def test_a_last_event_id_of_another_text_starts_from_the_beginning(
    shared_stack: Stack, broker: Broker
) -> None:
    """Those of another job, of a longer text, and those that were never given out: the text begins
    anew, and says so."""
    frames = FRAMES["one attempt"]
    other = await _finished_job(broker, [(1, 0, ["x"]), (1, 1, ["yz"])], "xyz")
    job_id = await _finished_job(broker, frames)
    before = await asyncio.to_thread(_events, shared_stack, job_id)
    others = await asyncio.to_thread(_events, shared_stack, other)
    meaningless = [event["id"] for event in others if event["event"] == "tokens"]
    assert meaningless
    for after in (
        *meaningless,
        "tail",
        "9" * 19,
        "0",
        "1.1.1.1.1",
        "1.99999999.1.1.1",
        "0.0.0.1.-1",
    ):
        rest = await asyncio.to_thread(_events, shared_stack, job_id, after)
        assert _text([*before[:-1], *rest]) == "abcdef", after
        assert "retrying" in [event["event"] for event in rest], after


async def test_events_that_were_deleted_are_made_up_for_by_the_result(
    shared_stack: Stack, broker: Broker
) -> None:
    frames = FRAMES["one attempt"]
    job_id = await _finished_job(broker, frames)
    before = await asyncio.to_thread(_events, shared_stack, job_id)
    await broker.js.delete_stream(subjects.EVENTS)
    await ensure_topology(broker, Topology(), [])
    await _publish_events(broker, job_id, frames[1:])
    for cut in range(1, len(before)):
        rest = await asyncio.to_thread(_events, shared_stack, job_id, before[cut - 1]["id"])
        assert _text(before[:cut] + rest) == "abcdef", before[cut - 1]


async def _replace_events(broker: Broker, config: StreamConfig) -> None:
    while True:
        await broker.js.delete_stream(subjects.EVENTS)
        # The gateway may be faster.
        with suppress(nats.js.errors.BadRequestError):
            await broker.js.add_stream(config)
            return


async def _stored(broker: Broker, job_id: str) -> int:
    info = await broker.js.stream_info(
        subjects.EVENTS, subjects_filter=subjects.events("tiny", job_id)
    )
    return sum((info.state.subjects or {}).values())


def _events(stack: Stack, job_id: str, after: str = "") -> list[Event]:
    headers = {"last-event-id": after} if after else {}
    with stack.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        return list(server_sent_events(response))


def _text(events: list[Event]) -> str:
    """What a reader of these events is left with."""
    text = ""
    for event in events:
        if event["event"] == "retrying":
            text = ""
        elif event["event"] == "tokens":
            text += json.loads(event["data"])["text"]
    return text
