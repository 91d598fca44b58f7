"""The token that is chosen from the model's output, beside llama.cpp's own samplers."""

from collections.abc import Iterator
from typing import Any

import llama_cpp
import pytest

from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from shared.wire.requests import Sampling

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
