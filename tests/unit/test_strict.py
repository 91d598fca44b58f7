"""A name that is not known is an error at every depth of what clients send, on every entrance.
Stored requests, which other versions have written, may contain other names."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect
from openai.types.chat import ChatCompletionMessage

from services.gateway.http.openai.inputs import EmbeddingsRequest, RerankRequest
from services.gateway.http.openai.parameters import Body
from services.gateway.http.openai.requests import ChatRequest, CompletionRequest
from services.gateway.http.openai.responses import input_types
from services.gateway.http.openai.responses.requests import ResponseRequest
from services.gateway.validation.decode import decode_body
from shared.errors import InvalidRequest
from shared.wire.api import ConcurrencyRequest, JobReference, JobSubmission, NatsSubmission
from shared.wire.codecs import decode_request, encode
from shared.wire.listing import BulkDeadRequest, BulkRequest, JobQuery
from shared.wire.requests import InferenceRequest
from shared.wire.tools import FunctionCall, ToolCall

SENT: list[Any] = [
    *(JobSubmission, NatsSubmission, JobQuery, JobReference, ConcurrencyRequest),
    *(BulkRequest, BulkDeadRequest),
    *(ChatRequest, CompletionRequest, EmbeddingsRequest, RerankRequest, ResponseRequest),
    *(input_types.MessageItem, input_types.AnswerItem, input_types.CallItem),
    *(input_types.CallOutputItem, input_types.ReasoningItem),
]
"""What the entrances read."""
SENT_BACK = {ToolCall, FunctionCall}
"""Clients send calls back with what other servers added to them."""

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
ASKED = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}


@pytest.mark.parametrize("kind", SENT, ids=lambda kind: kind.__name__)
def test_no_struct_that_clients_send_takes_unknown_names(kind: Any) -> None:
    """The names of a `Body` itself are checked apart."""
    found = {one.cls for one in _structs(inspect.type_info(kind))}
    assert kind in found
    for struct in found - SENT_BACK:
        assert struct.__struct_config__.forbid_unknown_fields or issubclass(struct, Body), struct


@pytest.mark.parametrize("kind", [JobSubmission, NatsSubmission])
@pytest.mark.parametrize(
    ("body", "param", "hint"),
    [
        ({"tools": [{**TOOL, "functon": 1}]}, "tools[0].functon", "did you mean function?"),
        (
            {"tools": [{**TOOL, "function": {**FUNCTION, "paramters": {}}}]},
            "tools[0].function.paramters",
            "did you mean parameters?",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "f", "x": 1}},
            },
            "tool_choice.function.x",
            "the fields are name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "stric": 1}}},
            "response_format.json_schema.stric",
            "did you mean strict?",
        ),
        (
            {"response_format": {"type": "regex", "pattern": "a", "patern": "b"}},
            "response_format.patern",
            "did you mean pattern?",
        ),
        ({"messages": [{"role": "user", "content": "hi", "nam": "x"}]}, "messages[0].nam", "name"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "txt": "b"}]}
                ]
            },
            "messages[0].content[0].txt",
            "did you mean text?",
        ),
        (
            {"messages": None, "query": "q", "documents": [{"text": "d", "title": "t"}]},
            "documents[0].title",
            "the fields are text",
        ),
    ],
    ids=str,
)
def test_a_job_is_refused_with_the_name_that_was_meant(
    kind: type[JobSubmission], body: dict[str, Any], param: str, hint: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_body(encode({**ASKED, **body}), kind)
    assert raised.value.param == param
    assert hint in raised.value.message


def test_an_answer_can_be_sent_back() -> None:
    """With all the fields that the official client gives it, and its calls with any others."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    answer = ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": "hi", "reasoning_content": "hm", "tool_calls": [call]}
    ).model_dump()
    read = decode_body(encode({"messages": [answer]}), JobSubmission)
    assert read.messages is not None
    assert read.messages[0].reasoning_content == "hm"
    answer["refusal"] = "no"
    with pytest.raises(InvalidRequest) as raised:
        decode_body(encode({"messages": [answer]}), JobSubmission)
    assert raised.value.param == "messages[0].refusal"
    assert raised.value.message == "messages[0].refusal is not supported; leave it out"


def test_a_stored_request_may_have_other_names() -> None:
    """Jobs that other versions queued still run, and dead letters of theirs can be retried."""
    found = {one.cls for one in _structs(inspect.type_info(InferenceRequest))}
    for struct in found:
        assert not struct.__struct_config__.forbid_unknown_fields, struct
    stored = {
        "task": "chat",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}], "x": 1}],
        "tools": [{**TOOL, "x": 1}],
        "response_format": {"type": "json_object", "x": 1},
        "x": 1,
    }
    assert decode_request(msgspec.json.encode(stored)).messages is not None


def _structs(kind: Any) -> Iterator[inspect.StructType]:
    match kind:
        case inspect.Metadata():
            yield from _structs(kind.type)
        case inspect.UnionType():
            for one in kind.types:
                yield from _structs(one)
        case inspect.ListType():
            yield from _structs(kind.item_type)
        case inspect.DictType():
            yield from _structs(kind.value_type)
        case inspect.StructType():
            yield kind
            for field in kind.fields:
                yield from _structs(field.type)
