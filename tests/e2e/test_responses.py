"""The Responses API, with the official client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.processes import Stack, eventually

LONG = 400
"""Tokens of an answer that takes a while."""


@pytest.fixture(scope="module")
def client(shared_stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_stack.url}/v1", api_key="none") as opened:
        yield opened


def events_of(stream: Any) -> list[dict[str, Any]]:
    return [event.to_dict(mode="json") for event in stream]


def numbers_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence_number"] for event in events]


def ended(client: openai.OpenAI, response_id: str) -> Any:
    """The response, once it has ended."""

    def read() -> Any:
        response = client.responses.retrieve(response_id)
        return response if response.status not in ("queued", "in_progress") else None

    return eventually(read, f"{response_id} ends")


def test_a_response_has_everything_the_client_models(client: openai.OpenAI) -> None:
    """Created, and read again: the same; it is the job of its id."""
    response = client.responses.create(
        model="tiny",
        input="hi",
        instructions="Be brief.",
        max_output_tokens=5,
        temperature=0,
        metadata={"user": "u77"},
        user="u77",
    )
    assert response.id.startswith("resp_")
    assert (response.object, response.model, response.status) == ("response", "tiny", "incomplete")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.instructions, response.max_output_tokens) == ("Be brief.", 5)
    assert (response.metadata, response.user) == ({"user": "u77"}, "u77")
    (message,) = response.output
    assert message.type == "message"
    assert message.status == "incomplete"
    assert response.output_text == message.content[0].text  # type: ignore[union-attr]
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    assert response.usage.total_tokens == response.usage.input_tokens + 5
    assert client.responses.retrieve(response.id) == response


def test_a_stream_says_what_the_whole_response_says(client: openai.OpenAI) -> None:
    """Every event in its order, numbered without a gap; the client's own accumulation is the
    response that is read afterwards."""
    with client.responses.stream(model="tiny", input="hi", max_output_tokens=30) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:5] == [
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.incomplete"
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == last.response.output_text
    again = client.responses.retrieve(last.response.id)
    assert again.to_dict() == last.response.to_dict()
    replayed = events_of(client.responses.retrieve(last.response.id, stream=True))
    assert numbers_of(replayed) == list(range(len(events)))
    assert replayed[-1]["response"] == again.to_dict(mode="json")
    for after in (0, 2, 5, len(events) - 2):
        rest = client.responses.retrieve(last.response.id, stream=True, starting_after=after)
        assert events_of(rest) == replayed[after + 1 :]
    end = client.responses.retrieve(last.response.id, stream=True, starting_after=len(events) - 1)
    assert events_of(end) == []
