"""Response formats for tests."""

import json

from msgspec import Raw

from shared.wire.requests import JsonSchema, NamedSchema


def schema_format(schema: object) -> JsonSchema:
    """The ``response_format`` with ``schema``, as JSON."""
    return JsonSchema(NamedSchema(Raw(json.dumps(schema).encode())))
