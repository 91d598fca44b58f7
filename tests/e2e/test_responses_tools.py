"""Tools and reasoning in responses, with the official client: each answer streamed and whole."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

from tests.support.families import brevity, write_family
from tests.support.processes import Stack

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a day.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Łódź"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
STOP: Any = {"type": "function", "name": "stop-it"}


class Served(NamedTuple):
    name: str
    client: openai.OpenAI
    brief: dict[str, Any]
    """Options with which an answer ends wherever it may: these models have random weights."""


@pytest.fixture(scope="module", params=["qwen", "thinker", "gpt-oss"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("family")
    path = write_family(folder, request.param)
    bias = brevity(path)
    with Stack(folder) as stack:
        stack.serve(path)
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            options = {"reasoning": {"effort": "none"}, "logit_bias": bias}
            yield Served(request.param, client, options)


def ask(family: Served, asked: Any = "What is the weather?", **options: Any) -> Any:
    """The response, which its events add up to."""
    own = {"seed": 3, "cache_prompt": False, **options.pop("extra_body", {})}
    request: Any = {"model": family.name, "input": asked, "max_output_tokens": 200, **options}
    with family.client.responses.stream(**request, extra_body=own) as stream:
        events: list[Any] = [event.to_dict(mode="json") for event in stream]
    whole = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    response = family.client.responses.retrieve(whole["id"])
    assert response.status == whole["status"]
    assert done == [item.to_dict(mode="json") for item in response.output]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert response.output_text == "".join(deltas)
    return response


def calls_in(response: Any) -> list[Any]:
    calls = [item for item in response.output if item.type == "function_call"]
    for call in calls:
        if call.name == "get_weather":
            jsonschema_rs.validate(WEATHER["parameters"], json.loads(call.arguments))
        else:
            assert (call.name, call.arguments) == ("stop-it", "{}")
    return calls


def test_a_loop_of_calls_and_their_outputs(family: Served) -> None:
    """The whole conversation is sent back, or the id of the response before: the same prompt."""
    tools = [WEATHER, STOP]
    first = ask(family, tools=tools, tool_choice="required", extra_body=family.brief)
    assert first.status == "completed"
    calls = calls_in(first)
    assert calls
    outputs: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        for call in calls
    ]
    common: Any = {"tools": tools, "tool_choice": "none", "max_output_tokens": 8}
    sent: Any = [{"role": "user", "content": "What is the weather?"}, *first.output, *outputs]
    by_items = ask(family, sent, **common)
    by_id = ask(family, outputs, previous_response_id=first.id, **common)
    assert by_items.usage.input_tokens == by_id.usage.input_tokens
    assert by_items.output_text == by_id.output_text
    assert not calls_in(by_id)


def test_a_choice_of_tools(family: Served) -> None:
    """One function, or one of those that are allowed."""
    tools = [WEATHER, STOP]
    options: Any = {"tools": tools, "parallel_tool_calls": False, "extra_body": family.brief}
    named: Any = {"type": "function", "name": "stop-it"}
    for choice in (named, {"type": "allowed_tools", "mode": "required", "tools": [named]}):
        (call,) = calls_in(ask(family, tool_choice=choice, **options))
        assert call.name == "stop-it"


class Forecast(BaseModel):
    """The weather of a day."""

    sunny: bool


def test_the_clients_own_tools(family: Served) -> None:
    """A pydantic model as a tool, whose arguments the client parses."""
    tool: Any = openai.pydantic_function_tool(Forecast)
    response = family.client.responses.parse(
        model=family.name,
        input="Sunny?",
        tools=[tool],
        tool_choice="required",
        extra_body=family.brief,
    )
    call = next(item for item in response.output if item.type == "function_call")
    assert isinstance(call.parsed_arguments, Forecast)


def test_reasoning_is_an_item(family: Served) -> None:
    """Before the message. Sent back, it is part of the conversation."""
    if family.name != "thinker":  # the only one that always reasons
        return
    response = ask(family, max_output_tokens=40)
    reasoning = response.output[0]
    assert reasoning.type == "reasoning"
    assert reasoning.content[0].type == "reasoning_text"
    assert reasoning.content[0].text
    more = ask(family, "more", previous_response_id=response.id, max_output_tokens=1)
    items: Any = [{"role": "user", "content": "What is the weather?"}, *response.output]
    again = ask(family, [*items, {"role": "user", "content": "more"}], max_output_tokens=1)
    assert again.usage.input_tokens == more.usage.input_tokens
