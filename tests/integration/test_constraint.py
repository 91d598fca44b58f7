"""What a grammar allows in the answer to a request with tools, token by token, for each family."""

import threading
from collections.abc import Iterator

import numpy
import pytest
from msgspec import Raw

from services.inferer.engine.constraint import constraint
from services.inferer.engine.model import Model
from shared.errors import InvalidRequest
from shared.wire.requests import ChatMessage, ModelRequest
from shared.wire.tools import Function, Tool
from tests.support.families import write_family
from tests.support.schemas import schema_format

PARAMETERS = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
F = Tool("function", Function("f", parameters=Raw(b'{"properties": {"a": {"enum": [1]}}}')))
CALL = '{"name": "f", "arguments": {"a": 1}}'
ANALYSIS = "<|channel|>analysis<|message|>x<|end|><|start|>assistant"
OK = ""

CASES: dict[str, list[tuple[str, str]]] = {
    "qwen": [
        ("Hi", OK),
        ('{"a": 1}', OK),
        (f"Hi <tool_call>\n{CALL}\n</tool_call>", OK),
        ("<think>\nmaybe <tool_call> or not</think>\n\nHi", OK),
        (f"<think>a</think>\n<tool_call>\n{CALL}\n</tool_call>", OK),
        ('Hi <tool_call>\n{"name": "g"', "g"),
    ],
    "hermes": [
        (f"a <tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call> b", OK),
        ("Hi <tool_call> no", " no"),
    ],
    "llama": [
        (CALL.replace("arguments", "parameters"), OK),
        ("<|python_tag|>" + CALL.replace("arguments", "parameters"), OK),
        ('Hi {"a": 1}', OK),
        ('{"type": "function"', "type"),
    ],
    "mistral": [("Hi", OK), (f"Hi [TOOL_CALLS][{CALL}]", OK)],
    "magistral": [
        ("[THINK]x[/THINK]Hi", OK),
        ('[THINK]x[/THINK][TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{"a": 1}', OK),
    ],
    "gpt-oss": [
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", OK),
        (
            f"{ANALYSIS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
            '{"a": 1}',
            OK,
        ),
        (f"{ANALYSIS}<|channel|>commentary to=functions.g", "g"),
    ],
}


@pytest.fixture(scope="module", params=CASES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Model]]:
    model = Model(write_family(tmp_path_factory.mktemp("family"), request.param), 0)
    yield request.param, model
    model.close()


def first_refused(model: Model, request: ModelRequest, tokens: list[int]) -> str:
    """The text of the first token that is not allowed; ``end`` if the answer must go on."""
    assert model.chat is not None
    prompt = model.chat.prompt(request, threading.Event())
    grammar = constraint(model, request, opened=prompt.opened != "", is_closed=prompt.is_closed)
    assert grammar is not None
    logits = numpy.zeros(model.vocabulary.size, dtype=numpy.float32)
    for token in tokens:
        logits.fill(0)
        grammar.restrict(logits)
        if logits[token] != 0:
            return model.read_piece(token).decode()
        grammar.accept(token)
    logits.fill(0)
    grammar.restrict(logits)
    return OK if any(logits[end] == 0 for end in model.vocabulary.ends) else "end"


def test_text_reasoning_and_calls_are_allowed_and_nothing_that_looks_like_a_call(
    family: tuple[str, Model],
) -> None:
    name, model = family
    request = ModelRequest(messages=[ChatMessage("user", "hi")], tools=[F])
    for text, refused in CASES[name]:
        tokens = model.tokenize(text, add_special=False)
        assert first_refused(model, request, tokens) == refused, text


def test_marks_of_control_tokens_cannot_be_spelled(family: tuple[str, Model]) -> None:
    """A reader sees the text only, and would take it for a call."""
    name, model = family
    marks = {"mistral": "[TOOL_CALLS]", "magistral": "[TOOL_CALLS]", "llama": "<|python_tag|>"}
    if name not in marks:
        name, marks = "none", {"none": "<tool_call>"}
    request = ModelRequest(messages=[ChatMessage("user", "hi")], tools=[F])
    spelled = model.tokenize(f"Hi {marks[name]} no", add_special=False, parse_special=False)
    assert first_refused(model, request, spelled) not in (OK, "end")


def test_an_answer_under_a_schema_has_nothing_beside_it(family: tuple[str, Model]) -> None:
    """Only reasoning, or a call in its place."""
    name, model = family
    request = ModelRequest(
        messages=[ChatMessage("user", "hi")], tools=[F], response_format=schema_format(PARAMETERS)
    )
    begin = f"{ANALYSIS}<|channel|>final<|message|>" if name == "gpt-oss" else ""
    allowed = model.tokenize(begin + '{"a": 1}', add_special=False)
    assert first_refused(model, request, allowed) == OK
    assert first_refused(model, request, model.tokenize("Hi", add_special=False)) == "Hi"
    if name == "gpt-oss":
        commentary = "<|channel|>commentary<|message|>"
        tokens = model.tokenize(commentary, add_special=False)
        assert first_refused(model, request, tokens) == "<|message|>"


def test_tools_without_a_conversation_do_not_matter(family: tuple[str, Model]) -> None:
    """As a message that was published past the gateways may have it."""
    _, model = family
    assert constraint(model, ModelRequest(prompt="x", tools=[F])) is None


def test_a_strict_schema_that_cannot_be_enforced_is_an_error(family: tuple[str, Model]) -> None:
    """Of a message that came past the gateways, too."""
    _, model = family
    parameters = Raw(b'{"properties": {"a": {"type": "array", "uniqueItems": true}}}')
    for strict in (True, False):
        tool = Tool("function", Function("f", parameters=parameters, strict=strict))
        request = ModelRequest(messages=[ChatMessage("user", "hi")], tools=[tool])
        if strict:
            with pytest.raises(InvalidRequest, match="uniqueItems") as refused:
                constraint(model, request)
            assert refused.value.param == "tools"
        else:
            assert constraint(model, request) is not None
