"""From a JSON schema to what llguidance follows (decision 19)."""

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
"""What llguidance counts. What it does not count is bounded by `schema_trial.py`."""

UNREACHABLE = 2**24
"""No answer has so many characters, items or properties: such a bound is left out."""
UPPER_BOUNDS = ("maxLength", "maxItems", "maxProperties")

# One line, as models write JSON most often. Free white space would let a model write it for ever.
OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # as `anyOf`: that no other branch fits as well is not checked
}

OF_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
TOGETHER = ("$ref", "allOf", "anyOf", "oneOf", "if", "unevaluatedProperties")
A_SCHEMA = ("items", "additionalProperties", "additionalItems", "not", "contains")


def compiled(schema: dict[str, Any], tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher for answers under ``schema``; it may be in error, which says what is wrong.

    Raises:
        ValueError, RecursionError: the schema cannot be followed.
    """
    together = '"allOf":' in json.dumps(schema, separators=(",", ":"))
    text = json.dumps(_prepared(schema, closes=not together))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def reason(matcher: llguidance.LLMatcher) -> str:
    """Why ``matcher`` is in error, in its first lines."""
    return matcher.get_error().partition("\n<state>")[0].strip()[:500]


def _prepared(schema: Any, closes: bool = True) -> Any:
    """``schema`` without bounds that no answer reaches. Where an object names its properties and
    does not say whether there may be others, there may not: a model would go on and on. Unless
    ``closes``, and where several schemas describe an object together, that is left alone.

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
        closes = closes and not any(name in schema for name in TOGETHER)
        if closes and "patternProperties" not in schema:
            prepared.setdefault("additionalProperties", False)
    for name in OF_SCHEMAS:
        if isinstance(found := schema.get(name), dict):
            prepared[name] = {key: _prepared(value, closes) for key, value in found.items()}
    for name in A_SCHEMA:
        if isinstance(schema.get(name), dict):
            prepared[name] = _prepared(schema[name], closes)
    for name in LISTS_OF_SCHEMAS:
        if isinstance(found := schema.get(name), list):
            prepared[name] = [_prepared(one, closes and name != "allOf") for one in found]
    return prepared
