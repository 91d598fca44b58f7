"""Schemas before the queue: tried by a gateway in a real process with limits."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.gateway.validation.schemas import TRIALS_AT_ONCE, Schemas
from shared.errors import InvalidRequest, Overloaded
from shared.schemas.trials import SchemaTrials
from shared.wire.api import Submission
from shared.wire.requests import GrammarFormat, JsonObject, PlainText, RegexFormat
from tests.support.schemas import schema_format

SLOW = {"type": "integer", "multipleOf": 999_983}
"""A second of CPU time, and then it is refused."""
TEXT = {"type": "string"}


@pytest.fixture
async def schemas() -> AsyncIterator[Schemas]:
    made = Schemas()
    yield made
    made.close()


def asking(schema: Any) -> Submission:
    return Submission(prompt="x", response_format=schema_format(schema))


async def refusal(schemas: Schemas, schema: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        await schemas.check(asking(schema))
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 600
    return refused.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"properties": 5},
        {"pattern": "("},
        {"pattern": "a{99999999999}"},
        {"pattern": "(" * 5000},
        {"pattern": "(?:" * 5000 + ")" * 5000},
        {"pattern": "((((\\w{100}){100}){100}){100})"},
        {"patternProperties": {"(": {}}},
        {"properties": {"a": {"items": {"pattern": "[z-a]"}}}},
        {"type": [[number] for number in range(5000)]},
        {"type": ["string", *({"a": number} for number in range(2000))]},
        {"anyOf": [{"type": 5}] * 2000},
        {"required": [[[number]] for number in range(3000)]},
        {"pattern": "(?i)" + "[ -\uffff]" * 3000},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:1/nothing"},
        {"$schema": "http://127.0.0.1:1/nothing", "type": "string"},
        {"$ref": "#"},
        {"multipleOf": 0},
        {"maxLength": -1},
        {"description": "x" * 40_000},
        {"type": "string", "pattern": "^[^\\u0000-\\U0010FFFF]$"},
        {"allOf": [TEXT, {"type": "integer"}]},
        {"const": 10**400},
        {"anyOf": [{"enum": list(range(100))}] * 200, "allOf": [{"multipleOf": 7}] * 50},
        5,
        True,
    ],
    ids=lambda schema: str(schema)[:40],
)
async def test_a_schema_that_cannot_be_enforced_is_refused(schemas: Schemas, schema: Any) -> None:
    """With its field and a reason that can be read; the next one is tried."""
    await refusal(schemas, schema)
    await schemas.check(asking(TEXT))


async def test_schemas_that_are_much_work_are_refused(schemas: Schemas) -> None:
    """Exponential ones, too: by the CPU time, or by a limit of llguidance."""
    doubling: dict[str, Any] = {"type": "object", "properties": {"a": TEXT}}
    names = {"d0": doubling}
    for level in range(1, 30):
        ref = {"$ref": f"#/$defs/d{level - 1}"}
        names[f"d{level}"] = {"allOf": [ref, {"anyOf": [ref, {"required": [f"{level}"]}]}]}
    letters = "abcdefghijklmnopqrstuvwxyz"
    for schema in (
        SLOW,
        {"allOf": [{"pattern": f".*{letter}.*"} for letter in letters]},
        {"$ref": "#/$defs/d29", "$defs": names},
        {"oneOf": [{"const": number} for number in range(700)] + [{"minimum": 0}]},
    ):
        await refusal(schemas, schema)


@pytest.mark.parametrize(
    "form",
    [
        RegexFormat("("),
        RegexFormat("a{99999999999}"),
        RegexFormat("(" * 5000 + ")" * 5000),
        RegexFormat("[^\\s\\S]"),
        RegexFormat("(?=a)b"),
        RegexFormat("[z-a]"),
        RegexFormat("a\\1"),
        GrammarFormat("root = x"),
        GrammarFormat('start: "a"'),
        GrammarFormat('root ::= "a" missing'),
        GrammarFormat("roots ::= [a-z]"),
        GrammarFormat("root ::= [z-a]"),
        GrammarFormat('root ::= "a'),
        GrammarFormat("root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
        GrammarFormat('root ::= ("a"{1000}){1000}{1000}'),
        GrammarFormat("root ::= root"),
        GrammarFormat("\n".join(f"r{n} ::= r{n + 1}" for n in range(1500)) + "\nroot ::= r0"),
    ],
    ids=lambda form: repr(form)[:50],
)
async def test_a_grammar_that_cannot_be_enforced_is_refused(
    schemas: Schemas, form: GrammarFormat | RegexFormat
) -> None:
    """With a sentence, within the limits; and the process, or another one, goes on."""
    with pytest.raises(InvalidRequest, match=r"^response_format: ") as refused:
        await schemas.check(Submission(prompt="x", response_format=form))
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 600
    await schemas.check(Submission(prompt="x", response_format=RegexFormat("[ab]+")))
    await schemas.check(Submission(prompt="x", response_format=GrammarFormat('root ::= "a"*')))


async def test_schemas_that_look_large_are_accepted(schemas: Schemas) -> None:
    """Recursion, long enumerations, deep nesting, many properties, ambiguous patterns."""
    deep: dict[str, Any] = TEXT
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for schema in (
        deep,
        {"enum": [f"word {number}" for number in range(1500)]},
        {"anyOf": [{"$ref": "#/$defs/list"}, TEXT], "$defs": {"list": {"items": {"$ref": "#"}}}},
        {"properties": {f"p{number}": TEXT for number in range(700)}},
        {"type": "string", "pattern": "^([a-z]?){40}$"},
        {"oneOf": [{"const": f"word {number}"} for number in range(100)]},
        {"maxLength": 2**31 - 1},
        {},
    ):
        await schemas.check(asking(schema))


async def test_formats_without_a_schema_need_no_process(schemas: Schemas) -> None:
    for response_format in (None, PlainText(), JsonObject()):
        await schemas.check(Submission(prompt="x", response_format=response_format))
    assert not children()


async def test_an_outcome_is_remembered(schemas: Schemas) -> None:
    """Both kinds: without a process, they are the same. The oldest is forgotten."""
    known = children()
    await schemas.check(asking(TEXT))
    refused = await refusal(schemas, {"not": TEXT})
    (process,) = children() - known
    schemas.close()
    assert process not in children()
    for _ in range(3):
        await schemas.check(asking(TEXT))
        assert await refusal(schemas, {"not": TEXT}) == refused


async def test_no_more_outcomes_are_remembered_than_there_is_room_for() -> None:
    """The one that was not sent for longest is forgotten first."""
    schemas = Schemas(remembered=2)
    for schema in (TEXT, {"title": "b"}, TEXT, {"title": "c"}):
        await schemas.check(asking(schema))
    schemas.close()  # none can be tried any more
    for schema in (TEXT, {"title": "c"}):
        await schemas.check(asking(schema))
    with pytest.raises(RuntimeError):
        await schemas.check(asking({"title": "b"}))


async def test_the_loop_runs_while_schemas_are_tried(schemas: Schemas) -> None:
    """The same schema from many clients is tried once, and no more than a few at a time; one that
    finds no turn is refused, and may be sent again. A client that hangs up ends nothing."""
    known = children()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    impatient = asyncio.create_task(schemas.check(asking(SLOW)))
    await asyncio.sleep(0.05)
    impatient.cancel()
    different = [{**SLOW, "title": str(number)} for number in range(16)]
    checks = [schemas.check(asking(schema)) for schema in [*[SLOW] * 10, *different]]
    outcomes = await asyncio.gather(*checks, return_exceptions=True)
    ticking.cancel()
    assert all(isinstance(outcome, InvalidRequest) for outcome in outcomes[:10]), outcomes[:10]
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds == {InvalidRequest, Overloaded}
    assert ticks > 50
    assert len(children() - known) <= TRIALS_AT_ONCE
    await schemas.check(asking(TEXT))


async def test_a_process_that_is_killed_is_replaced(schemas: Schemas) -> None:
    """As the kernel does when memory runs out: the schema is not to blame."""
    known = children()
    await schemas.check(asking(TEXT))
    (process,) = children() - known
    os.kill(process, signal.SIGKILL)
    await schemas.check(asking({"title": "another"}))


ANSWERS: list[tuple[dict[str, Any], str, bool]] = [
    (TEXT, '"x"', True),
    (TEXT, "5", False),
    (TEXT, '"x', False),
    (TEXT, "", False),
    (TEXT, '"a\nb"', False),
    ({"multipleOf": 0.01}, "19.99", True),
    ({"multipleOf": 0.01}, "19.995", False),
    ({"type": "number"}, "NaN", False),
    ({"type": "number"}, "1e999", True),
    ({"type": "number"}, "1e99999999", False),
    ({"maximum": 5}, "1e99999999999999999999", False),
    ({"maximum": 5}, "-1e-99999999999999999999", False),
    ({"maximum": 5}, "0e-999999999", True),
    ({"type": "integer"}, "1" * 6000, True),
    ({"maximum": 5}, "1" * 6000, False),
    ({"format": "date"}, '"2023-02-29"', False),
    ({"format": "date"}, '"2024-02-29"', True),
    ({"minProperties": 2}, '{"a": 1, "a": 2}', False),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "3", False),
    ({}, "[" * 100 + "]" * 100, True),
    ({}, "[" * 100_000 + "]" * 100_000, False),
]


@pytest.mark.parametrize(("schema", "answer", "valid"), ANSWERS, ids=lambda part: str(part)[:30])
def test_answers_are_checked_by_the_book(schema: Any, answer: str, valid: bool) -> None:
    """Exactly, with numbers of any length; what is not valid is said in a line."""
    trials = SchemaTrials(10)
    error = trials.answer_error(schema, answer)
    trials.close()
    assert (error is None) == valid, error
    assert error is None or 10 < len(error) < 600


def test_a_check_that_takes_too_much_ends() -> None:
    """A pattern that backtracks: the answer is not known to be valid."""
    trials = SchemaTrials(10)
    schema = {"anyOf": [{"pattern": "^(a|a)*(?=b)$", "title": str(n)} for n in range(100)]}
    assert trials.answer_error(schema, json.dumps("a" * 40)) is not None
    assert trials.answer_error(TEXT, '"x"') is None
    trials.close()


def children() -> set[int]:
    """The processes that try schemas for this one."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = {int(pid) for task in tasks for pid in task.read_text().split()}

    def tries_schemas(pid: int) -> bool:
        return b"shared.schemas.trial" in Path(f"/proc/{pid}/cmdline").read_bytes()

    return {pid for pid in found if tries_schemas(pid)}
