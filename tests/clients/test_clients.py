"""Clients that people use, each in an environment of its own, against a running stack: with chat
completions, and with the Responses API, which is the default of some.

Texts and objects are SmolLM2's. It is too small to decide to call a tool: its calls are forced by
grammar, and the clients' loops of tools run with a tiny model that calls one by itself
(`tests/support/caller.py`).
"""

import openai
import pytest

from tests.clients.programs.harness import TEXTS
from tests.clients.running import Ask, Client, require_person
from tests.support.caller import ANSWER

CLIENTS = {
    "langchain": Client("langchain", "plain stream structured forced tools embeddings"),
    "instructor": Client("instructor", "structured forced"),
    "pydantic-ai": Client("pydantic-ai", "plain stream structured forced tools"),
    "openai-agents": Client("openai-agents", "plain stream structured tools"),
    "litellm": Client("litellm", "plain stream structured tools embeddings"),
    "llama-index": Client("llama-index", "plain stream structured tools embeddings"),
    "llm": Client("llm", "plain stream structured tools"),
    "ai-sdk-openai": Client("vercel-ai", "plain stream structured tools embeddings"),
    "ai-sdk-compatible": Client(
        "vercel-ai", "plain stream structured tools embeddings", "compatible"
    ),
    **{
        f"{name}-responses": Client(name, cases, "responses")
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
    },
}
pytestmark = pytest.mark.timeout(300)


def able_to(case: str) -> pytest.MarkDecorator:
    names = [name for name, client in CLIENTS.items() if case in client.cases.split()]
    return pytest.mark.parametrize("name", names)


@able_to("plain")
def test_a_text_is_the_official_clients(ask: Ask, name: str, text: str) -> None:
    """Of a chat completion."""
    assert ask(CLIENTS[name], "plain")["got"] == text


@able_to("stream")
def test_a_streamed_text_comes_in_parts_and_is_the_same(ask: Ask, name: str, text: str) -> None:
    parts = ask(CLIENTS[name], "stream")["got"]
    assert "".join(parts) == text
    assert len(parts) > 1, "it did not stream"


@able_to("structured")
def test_an_answer_under_a_schema_is_an_object(ask: Ask, name: str) -> None:
    """Of the type that the program asked for."""
    require_person(ask(CLIENTS[name], "structured"))


@able_to("forced")
def test_a_forced_call_is_an_object(ask: Ask, name: str) -> None:
    """Clients without a loop of tools have a model call a function that stands for the answer."""
    require_person(ask(CLIENTS[name], "forced"))


@able_to("tools")
def test_a_tool_is_run_and_its_result_answered(ask: Ask, name: str) -> None:
    """With the client's default choice, `auto`: one call with valid arguments, and then the end."""
    outcome = ask(CLIENTS[name], "tools")
    assert len(outcome["called"]) == 1
    assert outcome["called"][0] in ("Oslo", "Bergen")
    assert outcome["got"] == ANSWER


@able_to("embeddings")
def test_embeddings_are_the_official_clients(ask: Ask, name: str, official: openai.OpenAI) -> None:
    answer = official.embeddings.create(model="embedder", input=TEXTS)
    expected = [one.embedding for one in answer.data]
    vectors = ask(CLIENTS[name], "embeddings")["got"]
    assert len(vectors) == len(expected)
    for vector, wanted in zip(vectors, expected, strict=True):
        assert vector == pytest.approx(wanted, abs=1e-6)
