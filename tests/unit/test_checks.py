"""What a gateway refuses before an inferer sees it, in milliseconds."""

import json
from typing import Any

import pytest
from msgspec import Raw

from services.gateway.validation.limits import (
    MAX_METADATA_BYTES,
    check_metadata,
    check_submission,
)
from services.gateway.validation.schemas import check_schema
from shared.errors import InvalidRequest
from shared.wire.api import JobSubmission
from shared.wire.requests import JsonSchema, NamedSchema


def _check(schema: dict[str, Any]) -> None:
    form = JsonSchema(NamedSchema(Raw(json.dumps(schema, indent=4).encode())))
    check_submission(JobSubmission(prompt="x", response_format=form), None)


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
        {"multipleOf": 0},
        {"maxLength": -1},
        {"description": "x" * 40_000},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_is_not_one_is_refused(schema: dict[str, Any]) -> None:
    """By the name of its field, with a reason of a length that can be read."""
    with pytest.raises(InvalidRequest) as refused:
        _check(schema)
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "(?i)" + "[ -\uffff]" * 100},
        {"pattern": "\\w" * 1000},
        {"pattern": "^([a-z]?){40}$"},
        {"pattern": "^(?=a)[^\\s]+$"},
        {"properties": {f"p{number}": {"pattern": "\\w{90}"} for number in range(700)}},
        {"properties": {f"p{number}": {"type": "string"} for number in range(900)}},
        {"anyOf": [{"type": "string"}] * 1500},
        {"enum": [[number] for number in range(4000)]},
        {"$ref": "#"},
        {"$schema": "http://127.0.0.1:1/nothing", "type": "string"},
        {"const": 10**400},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_costly_schema_is_checked_in_little_time(schema: dict[str, Any]) -> None:
    """Twenty times each; with an interpreted validator, or Python's own regular expressions, this
    took minutes. Nothing is fetched from anywhere."""
    for _ in range(20):
        _check(schema)


@pytest.mark.parametrize(
    "source",
    [
        *(
            b"5",
            b"null",
            b"[]",
            b'{"const": "\\ud800"}',
            b'{"const": [%b]}' % (b"[]," * 500_000 + b"[]"),
        ),
        *(b'{"const": ' + b"[" * depth + b"]" * depth + b"}" for depth in (70, 5000)),
        b'{"type": "string"' + b" " * 1_000_000 + b"}",
    ],
    ids=lambda source: str(source[:30]),
)
def test_a_schema_is_a_small_object(source: bytes) -> None:
    """Whatever else it is, it is refused before it takes memory."""
    with pytest.raises(InvalidRequest) as refused:
        check_schema(Raw(source), lambda: NamedSchema(Raw(source)).schema, "response_format")
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"5", b'"x"', b"[]", b'{"a": "\\ud800"}', b'{"a": "%s"}' % (b"x" * 20_000)),
        *(b'{"a": ' + b"[" * depth + b"]" * depth + b"}" for depth in (70, 5000)),
    ],
    ids=lambda metadata: str(metadata[:20]),
)
def test_metadata_is_a_small_object(metadata: bytes) -> None:
    """Refused by the name of its field."""
    with pytest.raises(InvalidRequest) as refused:
        check_metadata(Raw(metadata))
    assert refused.value.param == "metadata"


def test_metadata_may_have_any_content_that_fits() -> None:
    """Null means none, and 16 kB are enough for everybody."""
    for metadata in (b"null", b"{}", b'{"a": [1, {"b": null}], "c": "\xc3\xbc"}'):
        check_metadata(Raw(metadata))
    check_metadata(Raw(b'{"a": "%s"}' % (b"x" * (MAX_METADATA_BYTES - 9))))
