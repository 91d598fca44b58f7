"""Input items of responses become messages."""

import json
from typing import Any

import pytest
from msgspec import Raw

from services.gateway.http.openai.responses.items import messages_of, referenced_jobs
from shared.errors import InvalidRequest
from shared.wire.requests import ChatMessage, TextPart
from shared.wire.tools import FunctionCall, ToolCall


def read(*items: Any, known: Any = ()) -> list[ChatMessage]:
    return messages_of(encoded(*items), (), {item["id"]: item for item in known})


def encoded(*items: Any) -> list[Raw]:
    return [Raw(json.dumps(item).encode()) for item in items]


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


def output(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": "1"}


def reasoning(*texts: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}


def calls(*numbers: int) -> list[ToolCall]:
    return [ToolCall(f"c{number}", FunctionCall("f", "{}")) for number in numbers]


def test_what_an_assistant_does_in_a_row_is_one_message() -> None:
    """It reasons, says and calls, in this order; another order is another turn."""
    found = read(
        {"role": "user", "content": "a"},
        reasoning("b", "c"),
        reasoning("d"),
        {"role": "assistant", "content": "e"},
        call(1),
        call(2),
        output(1),
        output(2),
        call(3),
        reasoning("f"),
        {"role": "assistant", "content": "g"},
        {"role": "assistant", "content": "h"},
    )
    assert found == [
        ChatMessage("user", "a"),
        ChatMessage("assistant", "e", tool_calls=calls(1, 2), reasoning_content="bcd"),
        ChatMessage("tool", "1", tool_call_id="c1"),
        ChatMessage("tool", "1", tool_call_id="c2"),
        ChatMessage("assistant", "", tool_calls=calls(3)),
        ChatMessage("assistant", "g", reasoning_content="f"),
        ChatMessage("assistant", "h"),
    ]


def test_parts_are_texts() -> None:
    """Of messages, of answers that are sent back, and of outputs."""
    part = {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}
    refusal = {"type": "refusal", "refusal": "no"}
    shown = {"type": "input_text", "text": "b"}
    found = read(
        {"role": "assistant", "content": [part, refusal], "phase": "final_answer", "id": "msg_1"},
        call(1),
        {**output(1), "output": [shown], "status": "completed"},
        {"role": "user", "content": [shown, shown], "type": "message"},
    )
    assert [message.content for message in found] == [
        [TextPart("text", "a"), TextPart("text", "no")],
        "b",
        [TextPart("text", "b"), TextPart("text", "b")],
    ]


def test_a_reference_stands_for_an_item_of_any_kind() -> None:
    part = {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}
    said = {"type": "message", "role": "assistant", "id": "1", "status": "completed"}
    known = [{**said, "content": [part]}, {**call(1), "id": "2", "status": "completed"}]
    found = read(
        {"type": "item_reference", "id": "1"}, {"id": "2"}, {**output(1), "id": None}, known=known
    )
    assert found == [
        ChatMessage("assistant", "a", tool_calls=calls(1)),
        ChatMessage("tool", "1", tool_call_id="c1"),
    ]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user", "content": "a", "contnt": "b"}, "contnt"),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a", "txt": 1}]},
            "content[0].txt",
        ),
        ({"role": "user", "content": [{"type": "output_text", "text": "a"}]}, "content[0].type"),
        ({"role": "tool", "content": "a"}, "role"),
        ({**call(1), "arguments": "[]"}, "arguments"),
        ({**call(1), "arguments": "{"}, "arguments"),
        ({**call(1), "parameters": {}}, "parameters"),
        (output(1), "call_id"),
        ({**reasoning("a"), "text": "b"}, "text"),
        ({"type": "item_reference", "id": "x"}, "id"),
    ],
)
def test_what_an_item_cannot_have_is_named(item: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(item)
    assert raised.value.param == f"input[0].{param}"


def test_a_reference_has_an_id_alone() -> None:
    item = {"type": "item_reference", "id": "msg_1", "content": "a"}
    with pytest.raises(InvalidRequest) as raised:
        referenced_jobs(encoded(item))
    assert raised.value.param == "input[0].content"
