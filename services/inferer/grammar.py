"""From ``response_format`` to what tokens may come next, by llguidance (decision 19).

Everything here is bounded: what a schema takes too much work for is an error of that job.
"""

import json
import threading
from typing import TYPE_CHECKING, Any

import llama_cpp
import llguidance
import numpy
from numpy.typing import NDArray

from shared.errors import InvalidRequest
from shared.messages import JsonObject, JsonSchema, ResponseFormat

if TYPE_CHECKING:
    from services.inferer.llama import Model

Tokens = NDArray[numpy.int64]

PARAM = "response_format"

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Measured: of the hostile schemas in the tests none takes more than a second and 100 MiB, and
what people write stays far below."""

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


class Grammar:
    """One answer's grammar, and where in it the answer is."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: "Vocabulary") -> None:
        self._matcher = matcher
        self._size, self._end = vocabulary.size, vocabulary.ends[0]
        self._mask = numpy.zeros((self._size + 31) // 32, dtype=numpy.int32)

    def allowed(self) -> Tokens:
        """The tokens that may come next.

        Raises:
            InvalidRequest: there is none, or finding them takes too much work.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return numpy.array([self._end])
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = numpy.unpackbits(self._mask.view(numpy.uint8), bitorder="little", count=self._size)
        tokens = numpy.flatnonzero(bits)
        if not tokens.size:
            raise InvalidRequest("the schema leaves the model nothing to write", PARAM)
        return tokens

    def accept(self, token: int) -> None:
        """Go on behind ``token``, one of those allowed.

        Raises:
            InvalidRequest: this takes too much work.
        """
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"this schema cannot be followed: {_reason(self._matcher)}", PARAM)


class Vocabulary:
    """A model's tokens as llguidance wants them; made once, as it takes some tenths of a second."""

    def __init__(self, model: "Model") -> None:
        self._model = model
        self.size = int(llama_cpp.llama_vocab_n_tokens(model.vocab))
        self.ends: list[int] = []
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def grammar(self, response_format: ResponseFormat | None) -> Grammar | None:
        """What an answer of this format follows; None where it may be anything.

        Raises:
            InvalidRequest: the schema contradicts itself, says what cannot be followed, or is too
                large.
        """
        if not isinstance(response_format, JsonSchema | JsonObject):
            return None
        try:
            schema: dict[str, Any] = {"type": "object"}
            if isinstance(response_format, JsonSchema):
                schema = response_format.json_schema.schema
            together = '"allOf":' in json.dumps(schema, separators=(",", ":"))
            text = json.dumps(_prepared(schema, closes=not together))
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"this schema cannot be followed: {error}", PARAM) from error
        matcher = llguidance.LLMatcher(self._get_tokenizer(), grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(f"this schema cannot be followed: {_reason(matcher)}", PARAM)
        return Grammar(matcher, self)

    def _get_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                vocab = self._model.vocab
                tokens = range(self.size)
                self.ends = [t for t in tokens if llama_cpp.llama_vocab_is_eog(vocab, t)]
                if not self.ends:
                    raise InvalidRequest("this model has no token that ends an answer", PARAM)
                self._tokenizer = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Tokens(self._model, self.size, self.ends)),
                    n_vocab=self.size,
                    eos_token=self.ends,
                )
            return self._tokenizer


class _Tokens:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, model: "Model", size: int, ends: list[int]) -> None:
        self._model = model
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        pieces = [model.read_piece(token) for token in range(size)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        # Names that no text has: a token without text must not be taken for one with it.
        self.tokens = [piece or b"\xff<|%d|>" % token for token, piece in enumerate(pieces)]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._model.tokenize(text, add_special=False)


def _reason(matcher: llguidance.LLMatcher) -> str:
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
