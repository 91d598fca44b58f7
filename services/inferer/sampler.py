"""A native sampler chain for each job, in the order llama.cpp's own tools use."""

import ctypes
import json
import math
from collections.abc import Sequence

import llama_cpp
import numpy
from llama_cpp.llama_grammar import json_schema_to_gbnf

from services.inferer.llama import Model
from shared.errors import InvalidRequest
from shared.messages import JsonObject, JsonSchema, ResponseFormat, Sampling

PENALTY_WINDOW = 64
"""The last tokens that penalties look at."""

TOKEN_DATA = numpy.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])
"""``llama_token_data``, as llama.h has it."""

RANDOM_SEED = 0xFFFFFFFF
"""llama.cpp takes this seed as a wish for a random one, which would not repeat."""


class Sampler:
    """One job's chain. Native memory: close it."""

    def __init__(self, model: Model, options: Sampling, seed: int, prompt: Sequence[int]) -> None:
        """Build the chain; ``seed`` makes it repeatable, ``prompt`` counts for the penalties.

        Raises:
            InvalidRequest: the grammar of ``response_format`` cannot be built.
        """
        self._candidates: _Candidates | None = None
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        try:
            self._build(model, options, seed, prompt)
        except BaseException:
            self.close()
            raise

    def sample(self, context: object, row: int) -> int:
        """Choose the next token from the logits of ``row`` in the batch, and remember it.

        Raises:
            InvalidRequest: the grammar allows no token at all.
        """
        if self._candidates is None:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, row))
        token = self._candidates.choose(self._chain, context, row)
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def _build(self, model: Model, options: Sampling, seed: int, prompt: Sequence[int]) -> None:
        if options.response_format is not None:
            self._add_grammar(model, options.response_format)
        if (
            options.repeat_penalty != 1
            or options.presence_penalty != 0
            or options.frequency_penalty != 0
        ):
            penalties = llama_cpp.llama_sampler_init_penalties(
                llama_cpp.llama_vocab_n_tokens(model.vocab),
                PENALTY_WINDOW,
                options.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            )
            for token in prompt[-PENALTY_WINDOW:]:
                llama_cpp.llama_sampler_accept(penalties, token)
            self._add(penalties)
        if options.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if options.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(options.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(options.temperature))
        self._add(llama_cpp.llama_sampler_init_dist(native_seed(seed)))

    def _add_grammar(self, model: Model, response_format: ResponseFormat) -> None:
        grammar = _grammar(response_format)
        if grammar is None:
            return
        sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not sampler:
            raise InvalidRequest("llama.cpp cannot build a grammar from this schema", _PARAM)
        self._add(sampler)
        self._candidates = _Candidates(model)

    def _add(self, sampler: object) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)


class _Candidates:
    """Every token with its logit, for a chain that begins with a grammar.

    llama.cpp's own sampling takes some token even where the grammar allows none, and then throws
    a C++ exception that ends the process. Here that is seen before the token is accepted.
    """

    def __init__(self, model: Model) -> None:
        size = llama_cpp.llama_vocab_n_tokens(model.vocab)
        self._ids = numpy.arange(size, dtype=numpy.int32)
        self._tokens = numpy.zeros(size, dtype=TOKEN_DATA)
        self._array = llama_cpp.llama_token_data_array()

    def choose(self, chain: object, context: object, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        self._tokens["id"] = self._ids
        self._tokens["logit"] = numpy.ctypeslib.as_array(logits, shape=self._ids.shape)
        self._tokens["p"] = 0
        array = self._array
        array.data = self._tokens.ctypes.data_as(llama_cpp.llama_token_data_p)
        array.size, array.selected, array.sorted = self._ids.size, -1, False
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        if array.selected < 0 or math.isinf(chosen.logit):
            raise InvalidRequest("the schema leaves the model nothing to write", _PARAM)
        return int(chosen.id)


def native_seed(seed: int) -> int:
    """Any integer as one that llama.cpp takes at its word."""
    seed &= 0xFFFFFFFF
    return seed - 1 if seed == RANDOM_SEED else seed


_PARAM = "response_format"


def _grammar(response_format: ResponseFormat) -> str | None:
    match response_format:
        case JsonSchema(json_schema=named):
            schema = named.schema
        case JsonObject():
            schema = {"type": "object"}
        case _:
            return None
    try:
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:
        # The converter raises whatever a schema makes it stumble over.
        raise InvalidRequest(
            f"llama.cpp cannot make a grammar of this schema: {error or type(error).__name__}",
            _PARAM,
        ) from error
