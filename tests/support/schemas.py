"""Response formats for tests."""

import json

from msgspec import Raw

from shared.wire.requests import JsonSchema, NamedSchema


def schema_format(schema: object) -> JsonSchema:
    """The ``response_format`` with ``schema``, as JSON."""
    return JsonSchema(NamedSchema(Raw(json.dumps(schema).encode())))


TOO_MUCH: dict[str, object] = {
    "type": "string",
    "allOf": [{"pattern": f"{one}.{{10}}{one}"} for one in "abc"],
}
"""A gateway finds nothing wrong with it. With the vocabulary of a model it is too much work."""
