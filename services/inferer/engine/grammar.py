"""Computes the tokens that a request allows next, with llguidance (decision 19).

All work here is limited: a schema that takes too much is an error of its job.
"""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llama_cpp
import llguidance
import numpy
from numpy.typing import NDArray

from shared.bounded.process import LimitExceeded
from shared.errors import InvalidRequest, ModelError
from shared.schemas.compiler import compile_lark, compile_schema, error_text
from shared.schemas.trials import SchemaTrials
from shared.wire.requests import GrammarFormat, RegexFormat

if TYPE_CHECKING:
    from services.inferer.engine.model import Model

Logits = NDArray[numpy.float32]

TRIAL_S = 10.0
"""How long a trial may take on a busy machine. The limits of its process are lower."""


class Grammar:
    """One answer's grammar, and its state after the tokens so far."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: "Vocabulary", param: str) -> None:
        """``param`` is the field of the request that the grammar comes from."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._param = param
        self._size, self._end = vocabulary.size, vocabulary.ends[0]
        self._is_suppressing = vocabulary.is_suppressing
        self._mask = numpy.zeros((self._size + 31) // 32, dtype=numpy.int32)

    def copy(self) -> "Grammar":
        """A copy of the grammar in its current state, for another answer."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary, self._param)

    def restrict(self, logits: Logits) -> None:
        """Leave only the tokens that may come next: the others get minus infinity.

        Raises:
            InvalidRequest: there are none, or computing them takes too much work.
        """
        self._mask_out(logits)
        if self._is_suppressing and logits.max() == -numpy.inf:
            raise InvalidRequest(
                "the schema allows no next token that this model may generate; relax it",
                self._param,
            )

    def _mask_out(self, logits: Logits) -> None:
        if self._matcher.is_stopped() and not self._matcher.is_error():
            end = logits[self._end]
            logits.fill(-numpy.inf)
            logits[self._end] = end
            return
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        if not self._mask.any():
            raise InvalidRequest("the schema allows no next token; relax it", self._param)
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
            raise InvalidRequest(f"this schema cannot be enforced: {reason}", self._param)


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

    def schema_error(
        self, schema: dict[str, Any], cancelled: threading.Event | None = None
    ) -> str | None:
        """Why ``schema`` cannot be enforced, as a sentence; None if it can.

        Raises:
            LimitExceeded: it takes too much to find out; the message is a sentence, too.
            ModelError: no process could be started to try it.
            Cancelled: ``cancelled`` was set.
        """
        try:
            return self._trials.error(schema, cancelled)
        except LimitExceeded:
            raise
        except OSError as error:
            raise ModelError(str(error)) from error

    def language_error(
        self, form: GrammarFormat | RegexFormat, cancelled: threading.Event | None = None
    ) -> str | None:
        """Like `schema_error`, for a grammar or a regular expression.

        Raises:
            LimitExceeded, ModelError, Cancelled: as in `schema_error`.
        """
        try:
            return self._trials.language_error(form, cancelled)
        except OSError as error:
            raise ModelError(str(error)) from error

    def grammar_of_schema(self, schema: dict[str, Any], param: str) -> Grammar:
        """The grammar for JSON valid under ``schema``, which has no `schema_error`. ``param`` is
        the field of the request that it comes from.

        Raises:
            InvalidRequest: it cannot be enforced with this vocabulary.
        """
        return self._grammar(lambda tokenizer: compile_schema(schema, tokenizer), param)

    def grammar_of_lark(self, text: str, param: str) -> Grammar:
        """Like `grammar_of_schema`, for a grammar in llguidance's dialect of Lark."""
        return self._grammar(lambda tokenizer: compile_lark(text, tokenizer), param)

    def answer_error(self, schema: dict[str, Any], answer: str) -> str | None:
        """Why ``answer``, which is complete, is not valid under ``schema``; None if it is. Takes
        milliseconds, and `TRIAL_S` at most.

        Raises:
            ModelError: no process could be started to check it.
        """
        try:
            return self._trials.answer_error(schema, answer)
        except OSError as error:
            raise ModelError(str(error)) from error

    def _grammar(
        self, compiled: Callable[[llguidance.LLTokenizer], llguidance.LLMatcher], param: str
    ) -> Grammar:
        try:
            return Grammar(compiled(self._get_tokenizer(param)), self, param)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(str(error), param) from error

    @property
    def is_suppressing(self) -> bool:
        """Whether the model has tokens that must never be generated."""
        return bool(self._model.suppressed)

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer. The first use takes some hundredths of a second."""
        vocab = self._model.vocab
        ends = (t for t in range(self.size) if llama_cpp.llama_vocab_is_eog(vocab, t))
        return [token for token in ends if token not in self._model.suppressed]

    def _get_tokenizer(self, param: str) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if not self.ends:
                    raise InvalidRequest(
                        f"{param}: this model has no token that ends an answer; leave it out",
                        param,
                    )
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
        # Without control tokens: it asks how text is written.
        return self._model.tokenize(text, add_special=False, parse_special=False)
