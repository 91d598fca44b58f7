"""Checks of JSON schemas in requests."""

from collections.abc import Callable
from typing import Any

from jsonschema_rs import Draft202012Validator, FancyRegexOptions, ValidationError
from msgspec import Raw

from shared.errors import InvalidRequest
from shared.wire.codecs import encode

MAX_DEPTH = 64
"""Levels of nesting that every part of Sluice can decode."""

MAX_SCHEMA_BYTES = 32 * 1024
"""The time to compile a schema to a grammar can grow with the square of its size."""

MAX_WHITESPACE_FACTOR = 8
"""How many times larger a schema may be with its white space."""

PATTERN_OPTIONS = FancyRegexOptions(size_limit=1024 * 1024)
"""Limits the size of a compiled ``pattern``, and with it the time to compile it."""

MAX_REASON_CHARS = 200
"""A reason quotes the invalid part of the schema."""

_META_SCHEMA = Draft202012Validator(
    {"$ref": "https://json-schema.org/draft/2020-12/schema"}, offline=True
)


def check_schema(source: Raw, read: Callable[[], dict[str, Any]], param: str) -> dict[str, Any]:
    """The schema that ``read`` decodes from ``source``, which is the field ``param``.

    Raises:
        InvalidRequest: it is not a valid schema, is too large or nested too deeply.
    """
    too_large = InvalidRequest(f"{param}: the schema has more than {MAX_SCHEMA_BYTES} bytes", param)
    if len(source) > MAX_WHITESPACE_FACTOR * MAX_SCHEMA_BYTES:
        raise too_large
    try:
        schema = read()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param}: the schema cannot be read: {error}", param) from None
    if is_deeper(schema, MAX_DEPTH):
        raise InvalidRequest(
            f"{param}: the schema is nested more than {MAX_DEPTH} levels deep", param
        )
    if len(encode(schema)) > MAX_SCHEMA_BYTES:
        raise too_large
    try:
        _META_SCHEMA.validate(schema)
        # Compiling finds invalid patterns and references.
        Draft202012Validator(schema, offline=True, pattern_options=PATTERN_OPTIONS)
    except ValidationError as error:
        reason = error.message
        if len(reason) > MAX_REASON_CHARS:
            reason = reason[:MAX_REASON_CHARS] + "…"
        raise InvalidRequest(f"{param}: not a valid JSON schema: {reason}", param) from None
    return schema


def is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(is_deeper(item, levels - 1) for item in value)
    return False
