"""Streams of responses that go on elsewhere, or later."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from shared.broker.connection import Broker, connected
from shared.broker.results import store_result
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import StateEvent, TokenFrame
from shared.wire.responses import ResponseForm
from shared.wire.results import Completed, Usage
from tests.support.processes import PATIENCE_S, Stack, eventually

LONG = 300


@pytest.fixture
def two_gateways(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    with Stack(tmp_path) as stack:
        stack.serve(tiny_model)
        stack.start_gateway()
        eventually(lambda: _is_ready(stack.urls[1]), "the second gateway is ready")
        yield stack


def test_a_stream_goes_on_at_another_gateway(two_gateways: Stack) -> None:
    """Begun at one, which is killed: every event once, in order; the same as a third client sees
    from the beginning, while the job runs and when it has ended."""
    stack = two_gateways
    with _client(stack.urls[0]) as first, _client(stack.urls[1]) as second:
        stream = first.responses.create(
            model="tiny", input="hi", max_output_tokens=LONG, background=True, stream=True
        )
        seen: list[dict[str, Any]] = []
        for event in stream:
            seen.append(event.to_dict(mode="json"))
            if len(seen) == 10:
                stack.gateways[0].kill()
                break
        response_id = seen[0]["response"]["id"]
        resumed = second.responses.retrieve(
            response_id, stream=True, starting_after=seen[-1]["sequence_number"]
        )
        beside = second.responses.retrieve(response_id, stream=True)
        seen += [event.to_dict(mode="json") for event in resumed]
        assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
        assert seen[-1]["type"] == "response.incomplete"
        assert [event.to_dict(mode="json") for event in beside] == seen
        later = second.responses.retrieve(response_id, stream=True)
        assert [event.to_dict(mode="json") for event in later] == seen
        response = second.responses.retrieve(response_id)
        assert response.to_dict(mode="json") == seen[-1]["response"]
        deltas = [e["delta"] for e in seen if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == response.output_text
        # Its conversation goes on at the other gateway, too.
        more = second.responses.create(
            model="tiny", input="more", previous_response_id=response_id, max_output_tokens=1
        )
        assert more.usage is not None
        assert more.usage.input_tokens > LONG


@pytest.fixture
async def broker(shared_stack: Stack) -> AsyncIterator[Broker]:
    async with connected(BrokerSettings(url=shared_stack.nats.url), "test") as connection:
        yield connection


def _events(stack: Stack, job_id: str, after: int | None = None) -> list[dict[str, Any]]:
    with _client(stack.url) as client:
        options: Any = {} if after is None else {"starting_after": after}
        stream = client.responses.retrieve(f"resp_{job_id}", stream=True, **options)
        return [event.to_dict(mode="json") for event in stream]


@pytest.mark.parametrize("frames", ["all", "some", "none"])
async def test_events_that_are_gone_are_made_up_for_by_the_result(
    shared_stack: Stack, broker: Broker, frames: str
) -> None:
    """The second attempt has repeated the text of the first; whatever is left of the events."""
    words = ["One", ", two", ", three", " and the rest"]
    job_id = new_job_id()
    for attempt in (1, 2):
        started = StateEvent(state="started", attempt=attempt, at=timestamp(), inferer="x")
        if frames != "none":
            await broker.js.publish(subjects.state_events("tiny", job_id), encode(started))
        for number, word in enumerate(words[: 2 * attempt]):
            frame = TokenFrame(attempt=attempt, index=number, tokens=[word])
            if frames == "all" or (frames == "some" and number != 1):
                await broker.js.publish(subjects.token_events("tiny", job_id), encode(frame))
    await _store(broker, job_id, 2, "".join(words))
    whole = await asyncio.to_thread(_events, shared_stack, job_id)
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    assert whole[-1]["response"]["output"][0]["content"][0]["text"] == "".join(words)
    for after in range(len(whole)):
        assert await asyncio.to_thread(_events, shared_stack, job_id, after) == whole[after + 1 :]


async def test_a_second_attempt_with_another_text_ends_the_stream(
    shared_stack: Stack, broker: Broker
) -> None:
    """For a client that has a part of the first one. From its beginning, the response is whole."""
    job_id = new_job_id()
    await _differ(broker, job_id)
    (*_, error) = await asyncio.to_thread(_events, shared_stack, job_id, 6)
    assert (error["type"], error["code"]) == ("error", "attempt_differs")
    whole = await asyncio.to_thread(_events, shared_stack, job_id)
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    assert whole[-1]["response"]["output"][0]["content"][0]["text"] == "One and two, then"


async def test_a_key_gives_the_text_of_the_attempt_that_ended(
    shared_stack: Stack, broker: Broker
) -> None:
    """The client that repeats its request reads from the beginning, too."""
    body: Any = {"model": "tiny", "input": "hi", "background": True}
    body["extra_headers"] = {"Idempotency-Key": "attempts that differ"}

    def create(**options: Any) -> Any:
        with _client(shared_stack.url) as client:
            created = client.responses.create(**body, **options)
            return [event.to_dict(mode="json") for event in created] if options else created

    shared_stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
    try:
        first = await asyncio.to_thread(create)
        await _differ(broker, first.id.removeprefix("resp_"))
        whole = await asyncio.to_thread(create, stream=True)
    finally:
        shared_stack.http.put("/concurrency", json={"concurrency": 1}).raise_for_status()
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    assert whole[-1]["response"]["output"][0]["content"][0]["text"] == "One and two, then"


async def _differ(broker: Broker, job_id: str) -> None:
    """The events and the result of a job whose second attempt wrote another text."""
    for attempt, text in ((1, "One, two, three, four"), (2, "One and two")):
        started = StateEvent(state="started", attempt=attempt, at=timestamp(), inferer="x")
        await broker.js.publish(subjects.state_events("tiny", job_id), encode(started))
        frame = TokenFrame(attempt=attempt, index=0, tokens=[text])
        await broker.js.publish(subjects.token_events("tiny", job_id), encode(frame))
    await _store(broker, job_id, 2, "One and two, then")


async def _store(broker: Broker, job_id: str, attempt: int, text: str) -> None:
    result = Completed(
        id=job_id,
        model="tiny",
        attempt=attempt,
        queued_at=timestamp(),
        started_at=timestamp(),
        finished_at=timestamp(),
        text=text,
        task="chat",
        finish_reason="stop",
        usage=Usage(1, 6, 7),
        response=ResponseForm(),
    )
    await store_result(broker, result, PATIENCE_S)


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE_S)


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False
