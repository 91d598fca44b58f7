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

from shared.bounded.process import LimitExceeded
from shared.errors import InvalidRequest, ModelError
from shared.schemas.compiler import compile_schema, error_text
from shared.schemas.trials import SchemaTrials
from shared.wire.requests import JsonObject, JsonSchema, ResponseFormat

if TYPE_CHECKING:
    from services.inferer.engine.model import Model

Logits = NDArray[numpy.float32]

PARAM = "response_format"

LONGEST_SCHEMA = 2**20
"""Bytes. Decoded, one can take ten times its size; gateways take much shorter ones."""

TRIAL_S = 10.0
"""How long a trial may take on a busy machine. The limits of its process are lower."""

ANY_OBJECT = {"type": "object"}


class Grammar:
    """One answer's grammar, and its state after the tokens so far."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: "Vocabulary") -> None:
        self._matcher = matcher
        self._size, self._end = vocabulary.size, vocabulary.ends[0]
        self._mask = numpy.zeros((self._size + 31) // 32, dtype=numpy.int32)

    def restrict(self, logits: Logits) -> None:
        """Leave only the tokens that may come next: the others get minus infinity.

        Raises:
            InvalidRequest: there are none, or computing them takes too much work.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            end = logits[self._end]
            logits.fill(-numpy.inf)
            logits[self._end] = end
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        if not self._mask.any():
            raise InvalidRequest("the schema allows no next token; relax it", PARAM)
        forbidden = ~self._mask.view(numpy.uint8)
        bits = numpy.unpackbits(forbidden, bitorder="little", count=self._size)
        numpy.copyto(logits, -numpy.inf, where=bits.view(numpy.bool_))

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
            reason = error_text(self._matcher)
            raise InvalidRequest(f"this schema cannot be enforced: {reason}", PARAM)


class Vocabulary:
    """A model's tokens for llguidance; built once, as it takes some tenths of a second."""

    def __init__(self, model: "Model") -> None:
        self._model = model
        self.size = int(llama_cpp.llama_vocab_n_tokens(model.vocab))
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()
        self._trials = SchemaTrials(TRIAL_S)

    def close(self) -> None:
        self._trials.close()

    def grammar(
        self, response_format: ResponseFormat | None, cancelled: threading.Event | None = None
    ) -> Grammar | None:
        """The grammar for answers of this format; None if any answer is allowed.

        Raises:
            InvalidRequest: the schema contradicts itself, uses what is not supported, or is too
                large.
            ModelError: no process could be started to try it.
            Cancelled: ``cancelled`` was set.
        """
        schema = _schema_of(response_format)
        if schema is None:
            return None
        try:
            if schema is not ANY_OBJECT:
                refused = self._trials.error(schema, cancelled)
                if refused is not None:
                    raise InvalidRequest(refused, PARAM)
            return Grammar(compile_schema(schema, self._get_tokenizer()), self)
        except (ValueError, RecursionError, LimitExceeded) as error:
            raise InvalidRequest(str(error), PARAM) from error
        except OSError as error:
            raise ModelError(str(error)) from error

    def answer_error(self, response_format: ResponseFormat | None, answer: str) -> str | None:
        """Why ``answer``, which is complete, is not of this format; None if it is. Takes
        milliseconds, and `TRIAL_S` at most.

        Raises:
            ModelError: no process could be started to check it.
        """
        schema = _schema_of(response_format)
        if schema is None:
            return None
        try:
            return self._trials.answer_error(schema, answer)
        except OSError as error:
            raise ModelError(str(error)) from error

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


def _schema_of(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of answers; None if any answer is allowed.

    Raises:
        InvalidRequest: it cannot be read, or is too large.
    """
    if isinstance(response_format, JsonObject):
        return ANY_OBJECT
    if not isinstance(response_format, JsonSchema):
        return None
    named = response_format.json_schema
    if len(named.source) > LONGEST_SCHEMA:
        raise InvalidRequest(f"the schema has more than {LONGEST_SCHEMA} bytes", PARAM)
    try:
        return named.schema
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the schema cannot be read: {error}", PARAM) from error
