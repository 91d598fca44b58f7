"""Reading what models write: reasoning, calls of tools, and text."""

import random

import pytest

from shared.answers.calls import Call, tool_call
from shared.answers.marks import (
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    THINK,
    THINK_BRACKETS,
)
from shared.answers.reader import Answer, AnswerReader, Content, Reasoning, read_answer
from shared.wire.answers import PLAIN, AnswerFormat

F, G = Call("f", '{"a":1}'), Call("g", "{}")
CASES = {
    "plain text is left as it is": (PLAIN, " <think>a</think> <tool_call> \n", None),
    "reasoning, text and calls": (
        AnswerFormat(THINK, HERMES),
        '<think>\nhm </th\n</think>\n\nHi\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
        '</tool_call>\n<tool_call>{"name": "g"}</tool_call> bye\n',
        Answer("hm </th", "Hi\n\nbye", [F, G]),
    ),
    "reasoning that was cut off": (AnswerFormat(THINK), "<think>and so", Answer("and so", "", [])),
    "no reasoning": (AnswerFormat(THINK, HERMES), "\nHello \n", Answer("", "Hello \n", [])),
    "brackets": (AnswerFormat(THINK_BRACKETS), "[THINK]a[/THINK]b", Answer("a", "b", [])),
    "the mark of a call in its arguments": (
        AnswerFormat("", HERMES),
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        Answer("", "", [Call("f", '{"a":"</tool_call>"}')]),
    ),
    "a list of calls": (
        AnswerFormat("", HERMES),
        '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</tool_call>',
        Answer("", "", [F, G]),
    ),
    "arguments as a string": (
        AnswerFormat("", HERMES),
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        Answer("", "", [F]),
    ),
    "a call without its end": (
        AnswerFormat("", HERMES),
        'x<tool_call>{"name": "f", "arguments": {"a": 1}}',
        Answer("", "x", [F]),
    ),
    "a call that was cut off": (
        AnswerFormat("", HERMES),
        'x <tool_call>{"name": "f", "argu',
        Answer("", 'x <tool_call>{"name": "f", "argu', []),
    ),
    "what is no call": (
        AnswerFormat("", HERMES),
        "<tool_call>{'name': f}</tool_call> [1]",
        Answer("", "<tool_call>{'name': f}</tool_call> [1]", []),
    ),
    "a name that no tool can have": (
        AnswerFormat("", HERMES),
        '<tool_call>{"name": "f g", "arguments": {}}</tool_call>',
        Answer("", '<tool_call>{"name": "f g", "arguments": {}}</tool_call>', []),
    ),
    "llama": (AnswerFormat("", LLAMA), '{"name": "f", "parameters": {"a": 1}}', [F]),
    "llama, several": (
        AnswerFormat("", LLAMA),
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        [F, G],
    ),
    "llama, an object that is no call": (
        AnswerFormat("", LLAMA),
        '{"name": "John"} is it',
        Answer("", '{"name": "John"} is it', []),
    ),
    "llama, text": (AnswerFormat("", LLAMA), "1 <|2", Answer("", "1 <|2", [])),
    "mistral": (
        AnswerFormat("", MISTRAL),
        'Hi [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        Answer("", "Hi", [F, G]),
    ),
    "mistral, later": (
        AnswerFormat("", MISTRAL_ARGS),
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123[ARGS]{}',
        [F, G],
    ),
    "harmony": (
        AnswerFormat(HARMONY, HARMONY),
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "wait<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
        '<|message|>{"a": 1}',
        Answer("hm", "wait", [F]),
    ),
    "harmony, the recipient first": (
        AnswerFormat(HARMONY, HARMONY),
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        [F],
    ),
    "harmony, text": (
        AnswerFormat(HARMONY),
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b\n",
        Answer("a", "b\n", []),
    ),
    "harmony, without marks": (AnswerFormat(HARMONY), "Hi <|", Answer("", "Hi <|", [])),
    "harmony, a call that is none": (
        AnswerFormat(HARMONY, HARMONY),
        "<|channel|>commentary to=functions.f<|message|>{'a'",
        Answer("", "{'a'", []),
    ),
    "harmony, a mark in a text": (
        AnswerFormat(HARMONY),
        "<|channel|>final<|message|>It is <|end|> that ends it",
        Answer("", "It is\n\nthat ends it", []),
    ),
    "harmony, a mark in arguments": (
        AnswerFormat(HARMONY, HARMONY),
        '<|channel|>commentary to=functions.f<|message|>{"a": "<|end|>"}<|call|>',
        [Call("f", '{"a":"<|end|>"}')],
    ),
    "mistral, marks in arguments": (
        AnswerFormat("", MISTRAL),
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "[ARGS][TOOL_CALLS]"}}]',
        [Call("f", '{"a":"[ARGS][TOOL_CALLS]"}')],
    ),
    "mistral, later, marks in arguments": (
        AnswerFormat("", MISTRAL_ARGS),
        '[TOOL_CALLS]f[ARGS]{"a": "[ARGS][TOOL_CALLS]"}[TOOL_CALLS]g[ARGS]{}',
        [Call("f", '{"a":"[ARGS][TOOL_CALLS]"}'), G],
    ),
    "a format that is not known": (AnswerFormat("new", "newer"), "<x>", Answer("", "<x>", [])),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_read_alike_whole_and_in_pieces(case: str) -> None:
    """However it is cut into pieces."""
    format, text, wanted = CASES[case]
    if wanted is None:
        wanted = Answer("", text, [])
    elif isinstance(wanted, list):
        wanted = Answer("", "", wanted)
    assert read_answer(text, format) == wanted
    choose = random.Random(case)
    for longest in (1, 2, 3, 7, 20):
        reader, parts, at = AnswerReader(format), [], 0
        while at < len(text):
            size = choose.randint(1, longest)
            parts += reader.add(text[at : at + size])
            at += size
        parts += reader.finish()
        assert wanted == Answer(
            "".join(part.text for part in parts if isinstance(part, Reasoning)),
            "".join(part.text for part in parts if isinstance(part, Content)),
            [part for part in parts if isinstance(part, Call)],
        )


def test_text_is_passed_on_at_once() -> None:
    """All but what may become a mark."""
    reader = AnswerReader(AnswerFormat(THINK, HERMES))
    assert reader.add("<think>ab") == [Reasoning("ab")]
    assert reader.add("c</th") == [Reasoning("c")]
    assert reader.add("ink>d<") == [Content("d")]
    assert reader.add("b") == [Content("<b")]


def test_hostile_answers_take_no_time() -> None:
    """Marks without end, deep nesting: content, in the end. Each would take minutes if a mark cost
    a look at the whole answer."""
    string = '<tool_call>{"name": "f", "arguments": {"a": "'
    for text in (
        "<tool_call>" * 50_000,
        "<tool_call>" + "[" * 500_000,
        "<" * 500_000,
        string + "</tool_call>" * 80_000,
    ):
        assert read_answer(text, AnswerFormat(THINK, HERMES)).content == text
    many = '<tool_call>{"name": "g"}</tool_call>' * 30_000
    assert len(read_answer(many, AnswerFormat("", HERMES)).calls) == 30_000
    header = "<|channel|>analysis<|message|>x<|end|><|start|>assistant" * 20_000
    assert len(read_answer(header, AnswerFormat(HARMONY)).reasoning) == 3 * 20_000 - 2
    assert read_answer("{;" * 300_000, AnswerFormat("", LLAMA)).content == "{;" * 300_000


def test_the_id_of_a_call_is_always_the_same() -> None:
    """Nine letters and digits, as Mistral's templates want them; another for each call."""
    ids = {tool_call(F, f"job-{job}", number).id for job in range(20) for number in range(20)}
    assert len(ids) == 400
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
    assert tool_call(F, "job-1", 2) == tool_call(F, "job-1", 2)
