"""Tools, with the official client: each family of models in its own syntax, streamed and whole."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

from tests.support.families import FAMILIES, brevity, write_family
from tests.support.processes import Stack

CITIES = {"enum": ["Oslo", "Łódź", '"</tool_call>"']}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a day.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITIES, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
STOP: Any = {"type": "function", "function": {"name": "stop-it"}}
TOOLS = [WEATHER, STOP]
QUESTION: Any = [{"role": "user", "content": "What is the weather?"}]
SCHEMAS = {
    tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0})
    for tool in TOOLS
}


class Served(NamedTuple):
    """A model of a family, and a client of its stack."""

    name: str
    client: openai.OpenAI
    brief: dict[str, Any]
    """Options with which an answer ends wherever it may."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("family")
    path = write_family(folder, request.param)
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    with Stack(folder) as stack:
        stack.serve(path)
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            yield Served(
                request.param, client, {"logit_bias": brevity(path), "extra_body": options}
            )


class Said(NamedTuple):
    """What an answer says."""

    content: str
    reasoning: str
    calls: list[tuple[str, str, str]]
    """Ids, names and arguments."""
    finish_reason: str
    message: dict[str, Any]

    @property
    def without_ids(self) -> tuple[Any, ...]:
        calls = [call[1:] for call in self.calls]
        return self.content, self.reasoning, calls, self.finish_reason


def ask(family: Served, messages: Any = QUESTION, **options: Any) -> Said:
    """Streamed, the same request gives the same answer."""
    request: Any = {"model": family.name, "messages": messages, "seed": 3, "max_tokens": 200}
    request |= options
    # With a prompt from the cache, numbers are rounded differently.
    request["extra_body"] = {**request.get("extra_body", {}), "cache_prompt": False}
    (choice,) = family.client.chat.completions.create(**request).choices
    message = choice.message
    said = Said(
        message.content or "",
        getattr(message, "reasoning_content", ""),
        [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or []],
        choice.finish_reason,
        message.to_dict(),
    )
    stream = family.client.chat.completions.create(**request, stream=True)
    assert streamed(stream).without_ids == said.without_ids
    return said


def streamed(chunks: Iterable[Any]) -> Said:
    content, reasoning, reason = "", "", ""
    calls: list[tuple[str, str, str]] = []
    for chunk in chunks:
        (choice,) = chunk.choices
        delta = choice.delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", "")
        for call in delta.tool_calls or []:
            assert call.index == len(calls)
            calls.append((call.id, call.function.name, call.function.arguments))
        reason = choice.finish_reason or reason
    return Said(content, reasoning, calls, reason, {})


def require_valid(said: Said) -> list[tuple[str, str, str]]:
    """The calls of an answer, all of them to the tools and with arguments under their schemas."""
    assert said.finish_reason == "tool_calls"
    calls = said.calls
    assert calls
    for _, name, arguments in calls:
        jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
    assert len({call_id for call_id, *_ in calls}) == len(calls)
    return calls


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_model_that_must_call_a_tool_does(family: Served, temperature: float) -> None:
    """However unlikely it is. Results go back by the ids of the calls,
    and the next answer is a text."""
    said = ask(
        family,
        tools=TOOLS,
        tool_choice="required",
        temperature=temperature,
        **family.brief,
    )
    calls = require_valid(said)
    results: Any = [
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"} for call_id, *_ in calls
    ]
    if family.name in ("llama", "gpt-oss"):
        assert len(calls) == 1
    transcript = [*QUESTION, said.message, *results]
    answer = ask(family, transcript, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert not answer.calls
    assert answer.finish_reason in ("stop", "length")


def test_a_model_calls_the_tool_that_it_must_call(family: Served) -> None:
    """Once, also where it would repeat the call for ever."""
    choice: Any = {"type": "function", "function": {"name": "stop-it"}}
    answer = ask(family, tools=TOOLS, tool_choice=choice, **family.brief)
    ((_, name, arguments),) = require_valid(answer)
    assert (name, arguments) == ("stop-it", "{}")


def test_a_model_may_call_tools(family: Served) -> None:
    """Whatever it writes, calls are valid, and nothing of the syntax of calls is in the text."""
    texts = 0
    for seed in range(4):
        answer = ask(family, tools=TOOLS, seed=seed, max_tokens=60, temperature=1.0)
        for _, name, arguments in answer.calls:
            jsonschema_rs.validate(SCHEMAS[name], json.loads(arguments))
        texts += bool(answer.content or answer.reasoning)
    assert texts


def test_a_call_or_an_answer_under_a_schema(family: Served) -> None:
    """With a response format, too, the answer is one or the other."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(2):
        answer = ask(
            family,
            tools=TOOLS,
            response_format=response_format,
            seed=seed,
            temperature=1.0,
            **family.brief,
        )
        if answer.finish_reason == "tool_calls":
            require_valid(answer)
        elif answer.finish_reason == "stop":
            jsonschema_rs.validate(schema, json.loads(answer.content))


class Weather(BaseModel):
    """The weather of a day."""

    city: Literal["Oslo", "Bergen"]
    celsius: bool


def test_the_clients_own_tools(family: Served) -> None:
    """A pydantic model as a tool: the client parses the arguments, and sends back what it has."""
    model, client = family.name, family.client
    answer = client.chat.completions.parse(
        model=model,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        max_tokens=400,
        **family.brief,
    )
    message = answer.choices[0].message
    calls = message.tool_calls or []
    assert isinstance(calls[0].function.parsed_arguments, Weather)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    conversation: Any = [*QUESTION, message, *results]
    client.chat.completions.create(model=model, messages=conversation, max_tokens=1)


def test_the_status_shows_what_the_model_wrote_and_what_it_means(family: Served) -> None:
    """Under the same id as on /v1, by any route to the job."""
    model, client = family.name, family.client
    request: Any = {"model": model, "messages": QUESTION, "tools": TOOLS, "seed": 1, **family.brief}
    answer = client.chat.completions.create(**request, tool_choice="required", max_tokens=400)
    status = client.get(
        f"{str(client.base_url).removesuffix('/v1/')}/status/{answer.id.removeprefix('chatcmpl-')}",
        cast_to=object,
    )
    result: Any = status
    result = result["result"]
    assert result["finish_reason"] == "tool_calls"
    message = result["message"]
    assert message["tool_calls"] == [
        call.to_dict() for call in answer.choices[0].message.tool_calls
    ]
    assert message["tool_calls"][0]["function"]["name"] in result["text"]


def test_the_bundled_model_calls_the_tool_that_it_must_call(tmp_path: Path, smollm2: Path) -> None:
    """Its template knows no tools, and it is too small to choose one: a forced call."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(smollm2, INFERER_ALIAS="smollm2")
        stack.wait_until_served("smollm2")
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            said = ask(
                Served("smollm2", client, {}),
                tools=TOOLS,
                tool_choice={"type": "function", "function": {"name": "get_weather"}},
                temperature=0,
            )
    ((_, name, _),) = require_valid(said)
    assert name == "get_weather"
