"""A native sampler chain for each job, in the order that llama.cpp's own tools use."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import llama_cpp
import numpy

from services.inferer.engine.grammar import Grammar, Logits
from services.inferer.engine.model import Model
from services.inferer.engine.sampling_defaults import chosen_sampling
from shared.token_ids import require_token_ids
from shared.wire.requests import Sampling

PENALTY_WINDOW = 64
"""The number of last tokens that penalties apply to."""

LEAST_BIAS = -100
"""Of a token that must not come."""
BANNED = -1e9
"""The logit of such a token under a schema, which may allow no other: llama.cpp would divide minus
infinities."""

RANDOM_SEED = 0xFFFFFFFF
"""llama.cpp replaces this seed by a random one, which is not repeatable."""


class Logprobs(NamedTuple):
    """How likely a token was."""

    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens in its place, the likeliest first."""


class Sampler:
    """One job's chain. It is native memory: close it."""

    def __init__(
        self,
        model: Model,
        options: Sampling,
        seed: int,
        prompt: Sequence[int],
        grammar: Grammar | None = None,
    ) -> None:
        """Build the chain; the same ``seed`` repeats it, penalties apply to ``prompt``, too. What
        ``options`` leave open is as the model's GGUF says. Only what ``grammar`` allows is chosen.

        Raises:
            InvalidRequest: an option names a token that the model does not have.
        """
        self._grammar = grammar
        self._logits_type = ctypes.c_float * model.vocabulary.size
        self._values = chosen_sampling(options, model.sampling_defaults)
        self._takes_likeliest = self._values.temperature == 0
        self._adjustments = _Adjustments(model, options, BANNED if self._grammar else -numpy.inf)
        self._has_logprobs, self._top = options.logprobs, options.top_logprobs
        self.logprobs: Logprobs | None = None
        """Of the last token, if the request asks for them."""
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        try:
            self._build(model, options, seed, prompt)
        except BaseException:
            self.close()
            raise
        self._reads_logits = (
            self._takes_likeliest
            or self._has_logprobs
            or self._grammar is not None
            or self._adjustments.are_any
        )

    def sample(self, context: object, row: int) -> int:
        """Choose the next token from the logits of ``row`` in the batch, and add it to the state.
        To be called once for each row: it changes the logits.

        Raises:
            InvalidRequest: the schema allows no token, or takes too much work to follow.
        """
        if not self._reads_logits:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, row))
        logits = self._logits(context, row)
        if self._has_logprobs:
            output = logits.copy()
        if self._adjustments.are_any:
            self._adjustments.apply(logits)
        if self._grammar is not None:
            self._grammar.restrict(logits)
        if self._takes_likeliest:
            # llama.cpp would first copy the whole vocabulary.
            token = int(logits.argmax())
        else:
            token = int(llama_cpp.llama_sampler_sample(self._chain, context, row))
        if self._grammar is not None:
            # The sum of all probabilities may be a little less than 1.
            if logits[token] == -numpy.inf:
                token = int(logits.argmax())
            self._grammar.accept(token)
        if self._has_logprobs:
            self.logprobs = log_probabilities(output, token, self._top)
        return token

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def _logits(self, context: object, row: int) -> Logits:
        """The model's output in ``row``, in llama.cpp's memory."""
        logits = llama_cpp.llama_get_logits_ith(context, row)
        # `numpy.ctypeslib.as_array` takes three times as long.
        buffer: Any = self._logits_type.from_address(ctypes.addressof(logits.contents))
        return numpy.frombuffer(buffer, numpy.float32)

    def _build(self, model: Model, options: Sampling, seed: int, prompt: Sequence[int]) -> None:
        values = self._values
        if (
            values.repeat_penalty != 1
            or options.presence_penalty != 0
            or options.frequency_penalty != 0
        ):
            penalties = llama_cpp.llama_sampler_init_penalties(
                llama_cpp.llama_vocab_n_tokens(model.vocab),
                PENALTY_WINDOW,
                values.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            )
            for token in prompt[-PENALTY_WINDOW:]:
                llama_cpp.llama_sampler_accept(penalties, token)
            self._add(penalties)
            self._takes_likeliest = False
        if values.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if values.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(values.top_k))
        if values.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(values.top_p, 1))
        if values.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(values.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(values.temperature))
        self._add(llama_cpp.llama_sampler_init_dist(native_seed(seed)))

    def _add(self, sampler: object) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)


def log_probabilities(logits: Logits, token: int, top: int) -> Logprobs:
    """The logarithms of the probabilities of ``token`` and of the ``top`` likeliest tokens, by the
    model's output alone."""
    top = min(top, logits.size)
    most = logits.max()
    total = float(most) + math.log(numpy.exp(logits - most).sum(dtype=numpy.float64))
    likeliest = numpy.argpartition(logits, -top)[-top:] if top else numpy.empty(0, dtype=int)
    ranked = sorted(likeliest.tolist(), key=lambda one: (-logits[one], one))
    return Logprobs(
        float(logits[token]) - total, [(one, float(logits[one]) - total) for one in ranked]
    )


class _Adjustments:
    """What a request adds to the logits of single tokens, and which may not come, or not yet."""

    def __init__(self, model: Model, options: Sampling, banned: float) -> None:
        """``banned`` is the logit of a token that must not come.

        Raises:
            InvalidRequest: the model does not have such a token.
        """
        require_token_ids(options, model.vocabulary.size)
        biases, stops = options.logit_bias or {}, options.stop_token_ids or []
        self._biased = numpy.array(list(biases), dtype=numpy.int64)
        self._biases = numpy.array(list(biases.values()), dtype=numpy.float32)
        self._biases[self._biases <= LEAST_BIAS] = banned
        self._banned = banned
        self._min_tokens = options.min_tokens
        ends = model.vocabulary.ends if options.min_tokens or options.ignore_eos else []
        self._never = ends if options.ignore_eos else []
        self._suppressed = list(model.suppressed)
        self._not_yet = [*ends, *stops]
        self._tokens = 0
        """How many were sampled."""
        self.are_any = bool(biases or options.min_tokens or options.ignore_eos or self._suppressed)

    def apply(self, logits: Logits) -> None:
        """Adjust the logits of the next token."""
        logits[self._biased] += self._biases
        logits[self._never] = self._banned
        if self._tokens < self._min_tokens:
            logits[self._not_yet] = self._banned
        logits[self._suppressed] = -numpy.inf
        self._tokens += 1


def native_seed(seed: int) -> int:
    """Map any integer to a seed that llama.cpp uses as it is; seeds in a row to different ones."""
    seed &= 0xFFFFFFFF
    return seed // 2 if seed == RANDOM_SEED else seed
