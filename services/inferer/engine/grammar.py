"""Computes the tokens that ``response_format`` allows next, with llguidance (decision 19).

All work here is limited: a schema that takes too much is an error of its job.
"""

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llama_cpp
import llguidance
import numpy
from numpy.typing import NDArray

from services.inferer.bounded.schema_compiler import compile_schema, error_text
from services.inferer.bounded.schema_trials import SchemaTrials
from shared.errors import InvalidRequest
from shared.wire.requests import JsonObject, JsonSchema, ResponseFormat

if TYPE_CHECKING:
    from services.inferer.engine.model import Model

Tokens = NDArray[numpy.int64]

PARAM = "response_format"

LONGEST_SCHEMA = 2**20
"""Bytes. Decoded, one can take ten times its size; gateways take much shorter ones."""


class Grammar:
    """One answer's grammar, and its state after the tokens so far."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: "Vocabulary") -> None:
        self._matcher = matcher
        self._size, self._end = vocabulary.size, vocabulary.ends[0]
        self._mask = numpy.zeros((self._size + 31) // 32, dtype=numpy.int32)

    def allowed(self) -> Tokens:
        """The tokens that may come next.

        Raises:
            InvalidRequest: there are none, or computing them takes too much work.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return numpy.array([self._end])
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = numpy.unpackbits(self._mask.view(numpy.uint8), bitorder="little", count=self._size)
        tokens = numpy.flatnonzero(bits)
        if not tokens.size:
            raise InvalidRequest("the schema allows no next token; relax it", PARAM)
        return tokens

    def accept(self, token: int) -> None:
        """Advance by ``token``, one of those allowed.

        Raises:
            InvalidRequest: it takes too much work.
        """
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _cannot_follow(error_text(self._matcher))


class Vocabulary:
    """A model's tokens for llguidance; built once, as it takes some tenths of a second."""

    def __init__(self, model: "Model") -> None:
        self._model = model
        self.size = int(llama_cpp.llama_vocab_n_tokens(model.vocab))
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        self._trials = SchemaTrials()

    def close(self) -> None:
        self._trials.close()

    def grammar(
        self, response_format: ResponseFormat | None, cancelled: threading.Event | None = None
    ) -> Grammar | None:
        """The grammar for answers of this format; None if any answer is allowed.

        Raises:
            InvalidRequest: the schema contradicts itself, uses what is not supported, or is too
                large.
            Cancelled: ``cancelled`` was set.
        """
        if not isinstance(response_format, JsonSchema | JsonObject):
            return None
        schema: dict[str, Any] = {"type": "object"}
        try:
            if isinstance(response_format, JsonSchema):
                if len(response_format.json_schema.source) > LONGEST_SCHEMA:
                    raise _cannot_follow(f"it has more than {LONGEST_SCHEMA} bytes")
                schema = response_format.json_schema.schema
                if (reason := self._trials.error(schema, cancelled)) is not None:
                    raise _cannot_follow(reason)
            matcher = compile_schema(schema, self._get_tokenizer())
        except (ValueError, RecursionError) as error:
            raise _cannot_follow(str(error)) from error
        if matcher.is_error():
            raise _cannot_follow(error_text(matcher))
        return Grammar(matcher, self)

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer. The first use takes some hundredths of a second."""
        vocab = self._model.vocab
        return [t for t in range(self.size) if llama_cpp.llama_vocab_is_eog(vocab, t)]

    def _get_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if not self.ends:
                    raise InvalidRequest("this model has no token that ends an answer", PARAM)
                self._tokenizer = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(_Tokens(self._model, self.size, self.ends)),
                    n_vocab=self.size,
                    eos_token=self.ends,
                )
            return self._tokenizer


class _Tokens:
    """The interface that `llguidance.TokenizerWrapper` expects of a tokenizer."""

    def __init__(self, model: "Model", size: int, ends: list[int]) -> None:
        self._model = model
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        pieces = [model.read_piece(token) for token in range(size)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        # Names that occur in no text: a token without text must not match any.
        self.tokens = [piece or b"\xff<|%d|>" % token for token, piece in enumerate(pieces)]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._model.tokenize(text, add_special=False)


def _cannot_follow(reason: str) -> InvalidRequest:
    return InvalidRequest(f"this schema cannot be enforced: {reason}", PARAM)
