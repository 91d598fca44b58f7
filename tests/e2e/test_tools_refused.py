"""Tools, choices, calls and results that cannot be: refused before the queue, by name."""

from typing import Any

import pytest

from tests.support.processes import Stack

HI = {"role": "user", "content": "hi"}


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def calling(arguments: str = "{}", role: str = "assistant") -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": role, "content": None if role == "assistant" else "x", "tool_calls": [call]}


def result(call_id: str | None = "1", role: str = "tool") -> dict[str, Any]:
    known = {} if call_id is None else {"tool_call_id": call_id}
    return {"role": role, "content": "42", **known}


STRICT = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [tool("f g")]}, "tools[0].function.name"),
    ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
    ({"tools": [tool("f\n")]}, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools"),
    ({"tools": [tool(parameters=5)]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"x": "y" * 40_000})]}, "tools[0].function.parameters"),
    ({"tools": [tool(strict=True, parameters=STRICT)]}, "tools[0].function.parameters"),
    ({"tools": [tool(f"f{n}", parameters={"x": "y" * 30_000}) for n in range(5)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": "f"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice"),
    ({"tools": [tool()], "ignore_eos": True}, "ignore_eos"),
    ({"tools": [tool()], "min_tokens": 5}, "min_tokens"),
    ({"messages": [HI, result()]}, "messages[1].tool_call_id"),
    ({"messages": [HI, result(None)]}, "messages[1].tool_call_id"),
    ({"messages": [HI, calling(), result("2")]}, "messages[2].tool_call_id"),
    ({"messages": [HI, result(role="user")]}, "messages[1].tool_call_id"),
    ({"messages": [HI, calling(role="user")]}, "messages[1].tool_calls"),
    ({"messages": [HI, calling("[]")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [HI, calling("{")]}, "messages[1].tool_calls[0].function.arguments"),
    (
        {"messages": [HI, calling('{"a": ' * 70 + "1" + "}" * 70)]},
        "messages[1].tool_calls[0].function.arguments",
    ),
    ({"messages": [HI, calling('{"a": [' + "[]," * 100_000 + "1]}")]}, "messages"),
    ({"chat_template_kwargs": {"reasoning": "much"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused_by_name(
    shared_stack: Stack, body: dict[str, Any], param: str
) -> None:
    """In a sentence, by both edges of HTTP; nothing is queued."""
    request = {"messages": [HI], **body}
    answer = shared_stack.http.post("/jobs", json=request)
    assert (answer.status_code, answer.json().get("param")) == (400, param), answer.text
    assert answer.json()["detail"].startswith(param)
    answer = shared_stack.http.post("/v1/chat/completions", json=request)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), answer.text


def test_tools_need_messages(shared_stack: Stack) -> None:
    for name, value in (("tools", [tool()]), ("chat_template_kwargs", {"a": 1})):
        answer = shared_stack.http.post("/jobs", json={"prompt": "x", name: value})
        assert (answer.status_code, answer.json()["param"]) == (400, name)


def test_what_clients_send_anyway_is_taken(shared_stack: Stack) -> None:
    """No tools, a schema that cannot be enforced where nobody insists on it, no thinking of a model
    that does not think."""
    for body in (
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [tool(parameters=STRICT)], "tool_choice": "none"},
        {"tools": [tool(parameters=STRICT, strict=False)]},
        {"tools": [tool(parameters={})]},
        {"tools": [tool(parameters=None)]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [HI, calling(""), result()]},
    ):
        request = {"messages": [HI], "max_tokens": 5, **body}
        answer = shared_stack.http.post("/jobs", json=request, headers={"Prefer": "wait=60"})
        assert answer.json()["state"] == "SUCCESS", (body, answer.text)
