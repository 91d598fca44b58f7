"""What a GGUF says about sampling: values where a request says nothing, and tokens that must never
come."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from services.inferer.engine.constraint import constraint
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from shared.errors import InvalidRequest, ModelError
from shared.wire.requests import JsonObject, ModelRequest, SamplingDefaults
from tests.support.tiny_model import write_tiny_model

SUPPRESSED = "tokenizer.ggml.suppress_tokens"
STEPS = 40


@contextmanager
def loaded(path: Path, **fields: object) -> Iterator[Model]:
    """A tiny model whose GGUF has these fields under ``general.sampling.``."""
    metadata = {f"general.sampling.{name}": value for name, value in fields.items()}
    model = Model(write_tiny_model(path / "tiny.gguf", metadata=metadata), 0)
    yield model
    model.close()


@contextmanager
def suppressing(path: Path, tokens: list[int]) -> Iterator[Model]:
    model = Model(write_tiny_model(path / "tiny.gguf", metadata={SUPPRESSED: tokens}), 0)
    yield model
    model.close()


def generated(model: Model, seed: int = 1, **options: Any) -> list[int]:
    """The tokens of an answer that does not end."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, 1, 1
    context = llama_cpp.llama_init_from_model(model.handle, parameters)
    request = ModelRequest(prompt="x", **options)
    tokens = prompt = model.tokenize("tell me")
    sampler = Sampler(model, request, seed, prompt, constraint(model, request))
    chosen: list[int] = []
    try:
        while len(chosen) < STEPS:
            native = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(native, len(tokens))
            assert llama_cpp.llama_decode(context, batch) == 0
            tokens = [sampler.sample(context, -1)]
            chosen += tokens
    finally:
        sampler.close()
        llama_cpp.llama_free(context)
    return chosen


def test_a_gguf_that_says_nothing_leaves_llama_cpps_defaults(model: Model) -> None:
    """Those of Sluice so far: no text changes."""
    assert model.sampling_defaults == SamplingDefaults()
    told: dict[str, Any] = {
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
    }
    assert generated(model) == generated(model, **told)


def test_the_models_values_hold_where_the_request_does_not_say(
    tmp_path: Path, model: Model
) -> None:
    values: dict[str, Any] = {"temp": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.25}
    with loaded(tmp_path, **values, penalty_repeat=1.25) as told:
        wanted = SamplingDefaults(
            temperature=1.5, top_p=0.5, top_k=7, min_p=0.25, repeat_penalty=1.25
        )
        assert told.sampling_defaults == wanted
        options = {name: getattr(wanted, name) for name in SamplingDefaults.__struct_fields__}
        assert generated(told) == generated(model, **options) != generated(model)
        # The request wins, also with what would be the default elsewhere.
        options = {name: getattr(SamplingDefaults(), name) for name in options}
        assert generated(told, **options) == generated(model)
        # What it leaves open is still the model's.
        assert generated(told, top_k=1) == generated(model, top_k=1, repeat_penalty=1.25)


def test_a_temperature_of_0_in_the_gguf(tmp_path: Path, model: Model) -> None:
    with loaded(tmp_path, temp=0.0) as told:
        assert generated(told, 1) == generated(told, 2) == generated(model, temperature=0)
        assert generated(told, 1, temperature=2.0) != generated(told, 2, temperature=2.0)


def test_values_that_cannot_be_are_ignored(tmp_path: Path) -> None:
    """As if they were missing; the others hold."""
    values: dict[str, object] = {"temp": -1.0, "top_p": float("nan"), "top_k": "many"}
    with loaded(tmp_path, **values, min_p=0.5, penalty_repeat=0.0, mirostat=2) as told:
        assert told.sampling_defaults == SamplingDefaults(min_p=0.5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5}, {"seed": 3}])
def test_suppressed_tokens_never_come(
    tmp_path: Path, model: Model, options: dict[str, Any]
) -> None:
    """Whatever the request adds to them."""
    likely = sorted(set(generated(model, **options)))
    with suppressing(tmp_path, [*likely, 10**9]) as told:
        assert told.suppressed == set(likely)
        bias = dict.fromkeys(likely, 100.0)
        for more in ({}, {"logit_bias": bias}, {"response_format": JsonObject()}):
            found = generated(told, **options, **more)
            assert not told.suppressed.intersection(found)


def test_a_suppressed_end_does_not_end_an_answer(tmp_path: Path, model: Model) -> None:
    """Nor does a schema make it come."""
    end = model.vocabulary.ends[0]
    with suppressing(tmp_path, [end]) as told:
        assert end not in told.vocabulary.ends
        assert end not in generated(told, logit_bias={end: 100.0})
        assert end not in generated(told, response_format=JsonObject())


def test_a_schema_that_only_suppressed_tokens_can_satisfy(tmp_path: Path, model: Model) -> None:
    tokens = [t for t in range(model.vocabulary.size) if model.read_piece(t).strip()[:1] == b"{"]
    with suppressing(tmp_path, tokens) as told:
        for temperature in (0, 1.0):
            with pytest.raises(InvalidRequest, match="no next token that this model may generate"):
                generated(told, response_format=JsonObject(), temperature=temperature)


def test_a_list_of_suppressed_tokens_that_cannot_be_is_an_error_of_the_model(
    tmp_path: Path, model: Model
) -> None:
    for wrong, why in (
        (["a"], f"invalid gguf type for {SUPPRESSED}"),
        (list(range(model.vocabulary.size)), "suppresses all its tokens"),
    ):
        path = write_tiny_model(tmp_path / "tiny.gguf", metadata={SUPPRESSED: wrong})
        with pytest.raises(ModelError, match=why):
            Model(path, 0)
