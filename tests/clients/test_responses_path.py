"""The Responses API with the clients that have it; for some it is the default.

As in `test_clients.py`: texts and objects are SmolLM2's, and tools are called by a tiny model.
"""

import pytest

from tests.clients.running import Ask, Client, require_person
from tests.support.caller import ANSWER

CLIENTS = {
    name: Client(name, cases, "responses")
    for name, cases in {
        "langchain": "plain stream structured tools",
        "instructor": "forced",
        "pydantic-ai": "plain stream structured forced tools",
        "openai-agents": "plain stream structured tools",
        "litellm": "plain stream structured tools",
        "llama-index": "plain stream structured tools",
        "llm": "plain stream structured tools",
        "vercel-ai": "plain stream structured tools",
    }.items()
}
pytestmark = pytest.mark.timeout(300)


def able_to(case: str) -> pytest.MarkDecorator:
    names = [name for name, client in CLIENTS.items() if case in client.cases.split()]
    return pytest.mark.parametrize("name", names)


@able_to("plain")
def test_a_text_is_that_of_a_chat_completion(ask: Ask, name: str, text: str) -> None:
    assert ask(CLIENTS[name], "plain")["got"] == text


@able_to("stream")
def test_a_streamed_text_comes_in_parts_and_is_the_same(ask: Ask, name: str, text: str) -> None:
    parts = ask(CLIENTS[name], "stream")["got"]
    assert "".join(parts) == text
    assert len(parts) > 1, "it did not stream"


@able_to("structured")
def test_an_answer_under_a_schema_is_an_object(ask: Ask, name: str) -> None:
    require_person(ask(CLIENTS[name], "structured"))


@able_to("forced")
def test_a_forced_call_is_an_object(ask: Ask, name: str) -> None:
    require_person(ask(CLIENTS[name], "forced"))


@able_to("tools")
def test_a_tool_is_run_and_its_result_answered(ask: Ask, name: str) -> None:
    """One call with valid arguments, and then the end."""
    outcome = ask(CLIENTS[name], "tools")
    assert len(outcome["called"]) == 1
    assert outcome["called"][0] in ("Oslo", "Bergen")
    assert outcome["got"] == ANSWER
