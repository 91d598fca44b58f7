"""Compiles a JSON schema to a matcher of llguidance (decision 19)."""

import json
from typing import Any

import llguidance

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Limits that llguidance enforces. The rest of its work is limited by `schema_trial.py`."""

UNREACHABLE = 2**24
"""No answer has this many characters, items or properties: such a bound is dropped."""
UPPER_BOUNDS = ("maxLength", "maxItems", "maxProperties")

# One line, as models write JSON most often. With flexible white space a model may write it forever.
OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # as `anyOf`: it is not checked that no other branch matches
}

MAPS_OF_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "if", "unevaluatedProperties")
SINGLE_SCHEMAS = ("items", "additionalProperties", "additionalItems", "not", "contains")


def compile_schema(
    schema: dict[str, Any], tokenizer: llguidance.LLTokenizer
) -> llguidance.LLMatcher:
    """A matcher for answers under ``schema``. Its error, if it has one, must be checked.

    Raises:
        ValueError, RecursionError: the schema cannot be followed.
    """
    text = json.dumps(_prepared_schema(schema))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def compile_lark(text: str, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher for a grammar in llguidance's dialect of Lark. Its error must be checked."""
    grammar = llguidance.LLMatcher.grammar_from_lark(text)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def lark_json(schema: dict[str, Any]) -> str:
    """What stands for JSON valid under ``schema`` in such a grammar.

    Raises:
        ValueError, RecursionError: as `compile_schema`.
    """
    return f"%json {json.dumps({**_prepared_schema(schema), 'x-guidance': OPTIONS})}"


def _prepared_schema(schema: dict[str, Any]) -> dict[str, Any]:
    has_all_of = '"allOf":' in json.dumps(schema, separators=(",", ":"))
    prepared: dict[str, Any] = _prepared(schema, closes=not has_all_of)
    return prepared


def error_text(matcher: llguidance.LLMatcher) -> str:
    """The first lines of the error of ``matcher``."""
    return matcher.get_error().partition("\n<state>")[0].strip()[:500]


def _prepared(schema: Any, closes: bool = True) -> Any:
    """``schema`` without bounds that no answer reaches. If ``closes``, an object that names its
    properties, and does not say whether there may be others, has no others: a model might go on
    inventing them. Not where several schemas describe an object in combination.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if not isinstance(schema, dict):
        return schema
    prepared = dict(schema)
    for name in UPPER_BOUNDS:
        bound = schema.get(name)
        if isinstance(bound, int | float) and bound >= UNREACHABLE:
            del prepared[name]
    if "properties" in schema:
        closes = closes and not any(name in schema for name in COMBINING)
        if closes and "patternProperties" not in schema:
            prepared.setdefault("additionalProperties", False)
    for name in MAPS_OF_SCHEMAS:
        if isinstance(found := schema.get(name), dict):
            prepared[name] = {key: _prepared(value, closes) for key, value in found.items()}
    for name in SINGLE_SCHEMAS:
        if isinstance(schema.get(name), dict):
            prepared[name] = _prepared(schema[name], closes)
    for name in LISTS_OF_SCHEMAS:
        if isinstance(found := schema.get(name), list):
            prepared[name] = [_prepared(one, closes and name != "allOf") for one in found]
    return prepared
