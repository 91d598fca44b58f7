"""How large a JSON schema in a request may be."""

from collections.abc import Callable
from typing import Any

from msgspec import Raw

from shared.errors import InvalidRequest
from shared.wire.codecs import encode

MAX_DEPTH = 64
"""Levels of nesting that every part of Sluice can decode."""

MAX_SCHEMA_BYTES = 32 * 1024
"""The time to compile a schema to a grammar can grow with the square of its size."""

MAX_WHITESPACE_FACTOR = 8
"""How many times larger a schema may be with its white space."""


def read_schema(source: Raw, read: Callable[[], dict[str, Any]], param: str) -> dict[str, Any]:
    """The schema that ``read`` decodes from ``source``, which is the field ``param``.

    Raises:
        InvalidRequest: it is not an object, is too large or nested too deeply.
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
    return schema


def is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(is_deeper(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(is_deeper(item, levels - 1) for item in value)
    return False
