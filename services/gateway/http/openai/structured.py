"""The constraints on an answer, under all the names that clients use for them."""

from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from shared.errors import InvalidRequest
from shared.wire.requests import (
    MAX_GRAMMAR_CHARS,
    GrammarFormat,
    JsonObject,
    JsonSchema,
    NamedSchema,
    PlainText,
    RegexFormat,
    ResponseFormat,
)

ANY_ESCAPED = 0x80
"""Characters below this one are escaped in a regular expression."""


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's constraints on an answer. Only one of the first five may be set."""

    json: Raw | UnsetType = UNSET
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_fallback: bool | None = None
    """Ignored, like `disable_any_whitespace`: another backend is never tried, and white space is
    limited."""
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


def formats_of(request: Any) -> dict[str, ResponseFormat]:
    """The constraint on the answer to a `GenerationRequest`, by the name of the parameter that sets
    it; empty if the answer is free.

    Raises:
        InvalidRequest: two parameters set a constraint, or one cannot be read.
    """
    found: dict[str, ResponseFormat] = {}
    for param, form in request.own_format.items():
        if not isinstance(form, PlainText | None):
            found[param] = form
    outputs = request.structured_outputs or StructuredOutputs()
    for param, schema in (
        ("guided_json", request.guided_json),
        ("json_schema", request.json_schema),
        ("structured_outputs.json", outputs.json),
    ):
        if schema is not UNSET and bytes(schema) != b"null":
            found[param] = JsonSchema(NamedSchema(_schema(schema, param)))
    for param, grammar in (
        ("grammar", request.grammar),
        ("guided_grammar", request.guided_grammar),
        ("structured_outputs.grammar", outputs.grammar),
    ):
        if grammar:
            found[param] = GrammarFormat(_bounded(grammar, param))
    for param, pattern in (
        ("guided_regex", request.guided_regex),
        ("structured_outputs.regex", outputs.regex),
    ):
        if pattern:
            found[param] = RegexFormat(_bounded(pattern, param))
    for param, choices in (
        ("guided_choice", request.guided_choice),
        ("structured_outputs.choice", outputs.choice),
    ):
        if choices:
            found[param] = RegexFormat(_bounded("|".join(map(_escaped, choices)), param))
    if outputs.json_object:
        found["structured_outputs.json_object"] = JsonObject()
    if outputs.disable_additional_properties:
        param = "structured_outputs.disable_additional_properties"
        raise InvalidRequest(
            f"{param}: not supported; set `additionalProperties` in the schema", param
        )
    if len(found) > 1:
        first, second, *_ = found
        raise InvalidRequest(f"{second}: cannot be combined with {first}; send one", second)
    return found


def _schema(value: Raw, param: str) -> Raw:
    """A schema, which a client may also send as text.

    Raises: InvalidRequest: it is neither an object nor a text.
    """
    if bytes(value).startswith(b"{"):
        return value
    try:
        return Raw(msgspec.json.decode(value, type=str).encode())
    except ValueError:
        raise InvalidRequest(f"{param} must be an object or a string", param) from None


def _bounded(text: str, param: str) -> str:
    """Raises: InvalidRequest: ``text``, a grammar or a regular expression, is too long."""
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(
            f"{param}: {len(text)} characters are more than the limit of {MAX_GRAMMAR_CHARS}; make "
            "it simpler",
            param,
        )
    return text


def _escaped(text: str) -> str:
    """A regular expression that matches only ``text``."""
    return "".join(
        character
        if character.isalnum() or ord(character) >= ANY_ESCAPED
        else f"\\x{ord(character):02x}"
        for character in text
    )
