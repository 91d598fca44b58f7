"""The Responses API, with the official client."""

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel

from services.gateway.http.openai.responses.items import MAX_REFERENCED_JOBS
from shared.job_ids import new_job_id
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


def test_background(client: openai.OpenAI) -> None:
    """Returned at once, then read until it has ended; its job is listed under its id."""
    response = client.responses.create(
        model="tiny", input="hi", max_output_tokens=20, background=True
    )
    assert (response.status, response.background) == ("queued", True)
    assert response.output == []
    finished = ended(client, response.id)
    assert finished.status == "incomplete"
    assert len(finished.output_text) > 0
    job_id = response.id.removeprefix("resp_")
    status = client._client.get(f"{client.base_url}../status/{job_id}").json()
    assert status["state"] == "SUCCESS"


def test_more_tokens_than_the_context_has_are_allowed(client: openai.OpenAI) -> None:
    """The answer ends where the context does, as under the other routes."""
    response = client.responses.create(
        model="tiny", input="hi", max_output_tokens=10**6, background=True
    )
    assert response.status == "queued"
    assert client.responses.cancel(response.id).status == "cancelled"


def test_cancel(client: openai.OpenAI) -> None:
    """Queued or running; again; not if it has ended in another way. A stream of it ends."""
    response = client.responses.create(
        model="tiny", input="hi", max_output_tokens=LONG, background=True
    )
    stream = client.responses.retrieve(response.id, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    cancelled = client.responses.cancel(response.id)
    assert (cancelled.id, cancelled.status) == (response.id, "cancelled")
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.retrieve(response.id) == cancelled
    *_, last = events_of(stream)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "cancelled"
    done = client.responses.create(model="tiny", input="hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="already ended"):
        client.responses.cancel(done.id)


def test_a_stream_that_was_cut_off_goes_on_to_a_cancel(client: openai.OpenAI) -> None:
    """After what the client has; the numbers are those of a client that stayed."""
    stream = client.responses.create(
        model="tiny", input="hi", max_output_tokens=LONG, background=True, stream=True
    )
    seen: list[dict[str, Any]] = []
    for event in stream:
        seen.append(event.to_dict(mode="json"))
        if len(seen) == 10:
            break
    stream.close()
    response_id = seen[0]["response"]["id"]
    client.responses.cancel(response_id)
    rest = client.responses.retrieve(response_id, stream=True, starting_after=len(seen) - 1)
    events = seen + events_of(rest)
    assert numbers_of(events) == list(range(len(events)))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["status"] == "cancelled"
    assert events_of(client.responses.retrieve(response_id, stream=True))[:10] == seen


def test_delete(client: openai.OpenAI) -> None:
    """A response that has ended is gone, and its job too; one that runs is cancelled first."""
    response = client.responses.create(model="tiny", input="hi", max_output_tokens=3)
    client.responses.delete(response.id)
    for read in (
        client.responses.retrieve,
        client.responses.cancel,
        client.responses.delete,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError) as raised:
            read(response.id)
        assert (raised.value.code, raised.value.param) == ("response_not_found", "response_id")
    running = client.responses.create(
        model="tiny", input="hi", max_output_tokens=LONG, background=True
    )
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.responses.delete(running.id)
    client.responses.cancel(running.id)
    client.responses.delete(running.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(running.id)


def test_input_items(client: openai.OpenAI) -> None:
    """As they were sent, in both orders, page by page."""
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ]
    response = client.responses.create(
        model="tiny", input=items, instructions="Count.", max_output_tokens=1
    )
    listed = list(client.responses.input_items.list(response.id, order="asc", limit=2))
    assert [item.type for item in listed] == [
        "message",
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    shown = [item.to_dict(mode="json") for item in listed]
    assert shown[0]["role"] == "system"
    assert shown[1]["content"] == [{"type": "input_text", "text": "1 + 1?"}]
    assert {name: shown[3][name] for name in call} == call
    assert shown[4]["output"] == "2"
    backwards = list(client.responses.input_items.list(response.id, limit=1))
    assert backwards == listed[::-1]
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.input_items.list(response.id, after="msg_1")
    assert raised.value.param == "after"


def test_previous_response(client: openai.OpenAI) -> None:
    """The conversation goes on: its prompt is the whole of it, without the instructions of the
    response before, and the same as if all was sent."""
    common: Any = {"model": "tiny", "max_output_tokens": 8, "temperature": 0}
    first = client.responses.create(**common, input="hi", instructions="Be brief.")
    second = client.responses.create(**common, input="more", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    third = client.responses.create(
        **common, input="again", previous_response_id=second.id, instructions="Be long."
    )
    said: Any = [
        {"role": "user", "content": "hi"},
        *first.output,
        {"role": "user", "content": "more"},
        *second.output,
        {"role": "user", "content": "again"},
    ]
    whole = client.responses.create(**common, input=said, instructions="Be long.")
    assert whole.output_text == third.output_text
    assert whole.usage is not None
    assert third.usage is not None
    assert whole.usage.input_tokens == third.usage.input_tokens
    (asked,) = client.responses.input_items.list(third.id)
    assert asked.to_dict()["content"] == [{"type": "input_text", "text": "again"}]
    referred: Any = [*said[:3], {"type": "item_reference", "id": second.output[0].id}, said[4]]
    again = client.responses.create(**common, input=referred, instructions="Be long.")
    assert again.output_text == third.output_text


def test_references_have_a_bound(client: openai.OpenAI) -> None:
    """Each of them is short, and stands for an item of any length."""
    response = client.responses.create(model="tiny", input="hi", max_output_tokens=2)
    reference: Any = {"type": "item_reference", "id": response.output[0].id}
    many: Any = [
        {"type": "item_reference", "id": f"msg_{new_job_id()}_0"}
        for _ in range(MAX_REFERENCED_JOBS + 1)
    ]
    for items, param in (([reference, reference], "input[1].id"), (many, "input")):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(model="tiny", input=items, max_output_tokens=2)
        assert raised.value.param == param


TOOL: Any = {"type": "function", "name": "get_weather"}


class Weather(BaseModel):
    sunny: bool


def test_structured_output(client: openai.OpenAI) -> None:
    """``parse`` gives an object of the type that was asked for."""
    response = client.responses.parse(model="tiny", input="Sunny?", text_format=Weather)
    assert isinstance(response.output_parsed, Weather)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
    assert client.responses.retrieve(response.id).text == response.text
    with client.responses.stream(model="tiny", input="Sunny?", text_format=Weather) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def test_log_probabilities(client: openai.OpenAI) -> None:
    """Those of each token, in the events as in the whole."""
    request: Any = {
        "model": "tiny",
        "input": "hi",
        "max_output_tokens": 12,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    with client.responses.stream(**request) as stream:
        events: list[Any] = [event.to_dict(mode="json") for event in stream]
    response: Any = events[-1]["response"]
    (message,) = response["output"]
    (part,) = message["content"]
    assert len(part["logprobs"]) == 12
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    assert "".join(bytes_of(part["logprobs"])) == part["text"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [one for delta in deltas for one in delta["logprobs"]] == part["logprobs"]
    replayed = client.responses.retrieve(response["id"], stream=True)
    assert events_of(replayed) == [raw(event) for event in events]


def bytes_of(logprobs: list[dict[str, Any]]) -> list[str]:
    return [bytes(b for one in logprobs for b in one["bytes"]).decode("utf-8", "replace")]


def raw(event: dict[str, Any]) -> dict[str, Any]:
    """Without what the client's accumulation adds."""
    return {name: value for name, value in event.items() if name not in ("snapshot", "parsed")}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_token": 5}, "max_token"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "never"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools[0].name",
        ),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "hi", "contnt": "ho"}]}, "input[0].contnt"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]},
            "input[0].call_id",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "1"}]},
            "input[0].arguments",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"metadata": 5}, "metadata"),
        ({"adapter": "none"}, "adapter"),
        ({"temperature": "1"}, "temperature"),
    ],
)
def test_what_is_refused_is_named(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    """Before the queue, with the name of the parameter."""
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/responses", cast_to=object, body={"model": "tiny", "input": "hi", **body})
    assert raised.value.param == param
    assert param.partition("[")[0].partition(".")[0] in raised.value.message


def test_a_reference_without_an_id_is_refused(client: openai.OpenAI) -> None:
    """The missing field is named, not an empty id."""
    reference: Any = {"type": "item_reference"}
    with pytest.raises(openai.BadRequestError, match="id is missing"):
        client.responses.create(model="tiny", input=[reference])


def test_what_cannot_be_read_is_refused(client: openai.OpenAI) -> None:
    """Wherever it is: half of a surrogate pair, and what is nested too deeply."""
    deep = "[" * 5000 + "]" * 5000
    for fields in (
        r'"input": "\ud800"',
        r'"input": "\ud800 and more"',
        r'"input": [{"role": "user", "content": "\ud800 and more"}]',
        r'"input": [{"role": "user", "content": [{"type": "input_text", "text": "\udc00"}]}]',
        f'"input": [{{"role": "user", "content": {deep}}}]',
        f'"input": {deep}',
        r'"input": "hi", "tools": [{"type": "function", "name": "\ud800 and more"}]',
        r'"input": "hi", "tool_choice": "\ud800 and more"',
        f'"input": "hi", "conversation": {deep}',
    ):
        answer = httpx2.post(
            f"{client.base_url}responses", content=f'{{"model": "tiny", {fields}}}'
        )
        assert answer.status_code == 400, answer.text


def test_ids_of_other_kinds_are_unknown(client: openai.OpenAI) -> None:
    """404 in OpenAI's form, naming the parameter."""
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1
    )
    job_id = chat.id.removeprefix("chatcmpl-")
    missing = "resp_01890000-0000-7000-8000-000000000000"
    for response_id in (chat.id, f"resp_{job_id}", job_id, "resp_", "resp_x", missing):
        for read in (
            client.responses.retrieve,
            client.responses.cancel,
            client.responses.delete,
            client.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError) as raised:
                read(response_id)
            assert (raised.value.code, raised.value.param) == ("response_not_found", "response_id")
        with pytest.raises(openai.NotFoundError) as raised:
            client.responses.create(model="tiny", input="hi", previous_response_id=response_id)
        assert raised.value.param == "previous_response_id"
    said: Any = {"role": "user", "content": "hi"}
    reference: Any = {"type": "item_reference", "id": f"msg_{job_id}_0"}
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="tiny", input=[said, reference])
    assert raised.value.param == "input[1].id"


def test_what_is_not_stored_cannot_be_read(client: openai.OpenAI) -> None:
    """``store: false``: it is answered, and nothing else."""
    response = client.responses.create(model="tiny", input="hi", max_output_tokens=2, store=False)
    assert response.output_text
    with pytest.raises(openai.NotFoundError, match="store: false"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError) as raised:
        client.responses.create(model="tiny", input="hi", previous_response_id=response.id)
    assert raised.value.param == "previous_response_id"


def test_the_beta_client_reads_the_same(client: openai.OpenAI) -> None:
    """It adds `beta=true` to all URLs."""
    response = client.beta.responses.create(model="tiny", input="hi", max_output_tokens=2)
    assert client.beta.responses.retrieve(response.id).id == response.id
    assert client.beta.responses.input_items.list(response.id).data
    client.beta.responses.delete(response.id)


def test_where_a_stream_goes_on_is_checked(client: openai.OpenAI) -> None:
    """Beyond the end, negative, or not a number: 400 with the name."""
    response = client.responses.create(model="tiny", input="hi", max_output_tokens=2)
    for after in ("1000", "-1", "x"):
        with pytest.raises(openai.BadRequestError) as raised:
            client.get(
                f"/responses/{response.id}?stream=true&starting_after={after}", cast_to=object
            )
        assert raised.value.param == "starting_after", raised.value.message
    for query, param in (
        ("?starting_after=1", "starting_after"),
        ("?stream=5", "stream"),
        ("?include[]=file_search_call.results", "include"),
        ("?steam=true", "steam"),
        ("?stream=true&stream=false", "stream"),
        ("/input_items?limit=1&limit=2", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?limit=0", "limit"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.get(f"/responses/{response.id}{query}", cast_to=object)
        assert raised.value.param == param
        assert param in raised.value.message
        assert "regex" not in raised.value.message


def test_a_failed_job(client: openai.OpenAI) -> None:
    """Its own status at once, as on the other routes; in the background its error."""
    request: Any = {"model": "tiny", "input": "x " * 5000}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(**request, stream=stream)
        assert raised.value.code == "prompt_too_long"
    late = client.responses.create(
        model="tiny", input="hi", background=True, extra_body={"timeout_s": 0.001}
    )
    failed = ended(client, late.id)
    assert failed.status == "failed"
    assert failed.error.code in ("deadline_passed", "timed_out")
    (*_, last) = events_of(client.responses.retrieve(late.id, stream=True))
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == failed.error.code
