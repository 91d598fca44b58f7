"""The token that is chosen from the model's output, beside llama.cpp's own samplers."""

from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy
import pytest

from services.inferer.engine.constraint import constraint
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler, native_seed
from shared.wire.requests import JsonObject, ModelRequest, Sampling

STEPS = 50


@pytest.fixture
def context(model: Model) -> Iterator[Any]:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = 256
    handle = llama_cpp.llama_init_from_model(model.handle, parameters)
    yield handle
    llama_cpp.llama_free(handle)


def test_the_likeliest_token_is_the_one_that_llama_cpp_takes(model: Model, context: Any) -> None:
    """At temperature 0 it is found without llama.cpp's sampler; penalties change what is likely."""
    prompt = model.tokenize("tell me")
    plain = Sampler(model, Sampling(temperature=0), 1, prompt)
    penalized = Sampler(model, Sampling(temperature=0, repeat_penalty=10.0), 1, prompt)
    native = llama_cpp.llama_sampler_init_greedy()
    differed = 0
    tokens = prompt
    for _ in range(STEPS):
        batch = llama_cpp.llama_batch_get_one(
            (llama_cpp.llama_token * len(tokens))(*tokens), len(tokens)
        )
        assert llama_cpp.llama_decode(context, batch) == 0
        likeliest = llama_cpp.llama_sampler_sample(native, context, -1)
        assert plain.sample(context, -1) == likeliest
        tokens = [penalized.sample(context, -1)]
        differed += tokens[0] != likeliest
    assert differed
    for sampler in (plain, penalized):
        sampler.close()
    llama_cpp.llama_sampler_free(native)


def test_seeds_in_a_row_are_different_ones() -> None:
    """Also where they meet the one that llama.cpp replaces by a random one."""
    for first in (0, -4, 2**31 - 4, 2**32 - 4, 2**63 - 1):
        seeds = {native_seed(seed) for seed in range(first, first + 8)}
        assert len(seeds) == 8
        assert 0xFFFFFFFF not in seeds


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.5},
        {"temperature": 0, "logit_bias": {70: 50.0}, "repeat_penalty": 2.0},
        {"temperature": 1, "response_format": JsonObject()},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_models_output(
    model: Model, context: Any, options: dict[str, Any]
) -> None:
    """A softmax of llama.cpp's logits in 64 bits, whatever the request's options do to them."""
    prompt = tokens = model.tokenize("tell me")
    request = ModelRequest(prompt="x", **options, logprobs=True, top_logprobs=5)
    sampler = Sampler(model, request, 1, prompt, constraint(model, request))
    for _ in range(STEPS):
        batch = llama_cpp.llama_batch_get_one(
            (llama_cpp.llama_token * len(tokens))(*tokens), len(tokens)
        )
        assert llama_cpp.llama_decode(context, batch) == 0
        native = llama_cpp.llama_get_logits_ith(context, -1)
        logits = numpy.ctypeslib.as_array(native, shape=(model.vocabulary.size,)).astype("float64")
        wanted = logits - numpy.log(numpy.exp(logits).sum())
        token = sampler.sample(context, -1)
        assert sampler.logprobs is not None
        assert sampler.logprobs.logprob == pytest.approx(wanted[token], abs=1e-5)
        best = sorted(range(len(wanted)), key=lambda one: (-wanted[one], one))[:5]
        assert [one for one, _ in sampler.logprobs.top] == best
        assert [logprob for _, logprob in sampler.logprobs.top] == pytest.approx(
            wanted[best].tolist(), abs=1e-5
        )
        tokens = [token]
        if model.piece(token) is None:
            break
    sampler.close()
