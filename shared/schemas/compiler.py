"""Compiles JSON schemas and grammars to llguidance matchers (decisions 19, 45 and 53)."""

import json
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from shared.schemas.preparation import prepared
from shared.wire.requests import GrammarFormat, RegexFormat

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Limits that llguidance enforces. The rest of its work is limited by `trial.py`."""

MAX_REASON_CHARS = 200
"""A reason quotes a part of the schema."""

# One line, as models write JSON most often. With flexible white space a model may write it forever.
OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def compile_schema(
    schema: dict[str, Any], tokenizer: llguidance.LLTokenizer
) -> llguidance.LLMatcher:
    """A matcher for answers under ``schema``, which is valid under its meta-schema.

    Raises:
        ValueError, RecursionError: the schema cannot be enforced; the message is a sentence.
    """
    text = json.dumps(prepared(schema))
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    except ValueError as error:
        raise ValueError(f"this schema cannot be enforced: {error}") from None
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(f"this schema cannot be enforced: {error_text(matcher)}")
    return matcher


def compile_lark(text: str, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher for a grammar in llguidance's dialect of Lark.

    Raises:
        ValueError: it cannot be enforced; the message is a sentence.
    """
    grammar = llguidance.LLMatcher.grammar_from_lark(text)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(f"this cannot be enforced: {error_text(matcher)}")
    return matcher


def lark_json(schema: dict[str, Any]) -> str:
    """What stands for JSON valid under ``schema`` in such a grammar.

    Raises:
        ValueError, RecursionError: as `compile_schema`.
    """
    return f"%json {json.dumps({**prepared(schema), 'x-guidance': OPTIONS})}"


def lark_language(form: GrammarFormat | RegexFormat) -> str:
    """The expression for the texts of ``form`` in a Lark grammar.

    Raises:
        ValueError, RecursionError: it cannot be read; the message is a sentence.
    """
    if isinstance(form, RegexFormat):
        escaped = json.loads(llguidance.LLMatcher.grammar_from_regex(form.pattern))
        return f"%lark {{\n{escaped['grammars'][0]['lark_grammar']}\n}}"
    try:
        return f"%lark {{\n{gbnf_to_lark(form.grammar)}\n}}"
    except (RecursionError, MemoryError):
        raise
    except Exception as error:  # the converter raises plain exceptions
        raise ValueError(f"not a grammar in GBNF: {error}"[:MAX_REASON_CHARS]) from None


def error_text(matcher: llguidance.LLMatcher) -> str:
    """The first lines of the error of ``matcher``."""
    return matcher.get_error().partition("\n<")[0].strip()[:MAX_REASON_CHARS]
