"""Several answers to one prompt on the real llama.cpp: the prompt is computed once, and each answer
is what it would be alone, on four kinds of memory."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import pytest
from numpy.typing import NDArray

from services.inferer.engine.constraint import constraint
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted
from services.inferer.engine.speculation import Speculation
from shared.wire.requests import ModelRequest
from tests.support.architectures import write_hybrid, write_mamba, write_windowed
from tests.support.processes import eventually
from tests.support.schemas import schema_format
from tests.support.tiny_model import write_tiny_model

MIB = 1024**2
PATIENCE_S = 60.0
ROUNDING = 0.1
"""Logits: more than batches are rounded differently, far less than lies between two texts."""
N_BATCH = 32
PROMPT = "You are a careful assistant. " * 20
"""Far more tokens than the window of the tiny model that has one."""

KINDS: dict[str, Callable[[Path], Path]] = {
    "dense": write_tiny_model,
    "window": write_windowed,
    "hybrid": write_hybrid,
    "recurrent": write_mamba,
}


class Noting(Sampler):
    """Keeps what it has chosen and from which logits, or chooses what is ``forced``."""

    def __init__(
        self,
        model: Model,
        options: ModelRequest,
        seed: int,
        prompt: list[int],
        forced: list[int] | None = None,
    ) -> None:
        super().__init__(model, options, seed, prompt, constraint(model, options))
        self._size = model.vocabulary.size
        self._forced = forced
        self.chosen: list[int] = []
        self.logits: list[NDArray[numpy.float32]] = []

    def sample(self, context: object, row: int) -> int:
        native = llama_cpp.llama_get_logits_ith(context, row)
        self.logits.append(numpy.ctypeslib.as_array(native, shape=(self._size,)).copy())
        token = super().sample(context, row) if self._forced is None else self._forced[self.count]
        self.chosen.append(token)
        return token

    @property
    def count(self) -> int:
        return len(self.chosen)


class Run:
    """A sequence in the engine, and its answers so far."""

    def __init__(
        self, engine: Engine, prompt: str = PROMPT, *, forced: list[int] | None = None, **given: Any
    ) -> None:
        options = ModelRequest(prompt="x", **{"max_tokens": 20, "seed": 1, **given})
        self.engine = engine
        self.prompt = engine.model.tokenize(prompt)
        self.options = given
        self.texts = [""] * options.n
        self.samplers = [
            Noting(engine.model, options, (options.seed or 0) + number, self.prompt, forced)
            for number in range(options.n)
        ]
        self._ended: Future[Generation | Exception] = Future()
        self.sequence = GenerationSequence(
            lambda: (self.prompt, [*self.samplers]),
            options.max_tokens or engine.n_ctx,
            options.stop_strings,
            self._add,
            self._ended.set_result,
        )
        self.sequence.is_cold = forced is not None
        engine.submit(self.sequence)

    def _add(self, text: str) -> None:
        self.texts[self.sequence.choice] += text

    def outcome(self) -> Generation | Exception:
        return self._ended.result(PATIENCE_S)

    def generation(self) -> Generation:
        outcome = self.outcome()
        assert isinstance(outcome, Generation), outcome
        return outcome

    def check_each_alone(self) -> None:
        """Each answer has the logits that it has alone, from its first token to its last."""
        for sampler in self.samplers:
            alone = Run(self.engine, forced=sampler.chosen, **{**self.options, "n": 1})
            alone.generation()
            for row, other in zip(sampler.logits, alone.samplers[0].logits, strict=True):
                assert float(numpy.abs(row - other).max()) < ROUNDING


@contextmanager
def running(model: Model, **options: Any) -> Iterator[Engine]:
    sizes = {"slots": 1, "n_ctx": 2048, "n_batch": N_BATCH, "threads": 1}
    engine = Engine(model, **{**sizes, **options})
    try:
        yield engine
    finally:
        assert engine.close()


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    model = Model(KINDS[request.param](folder / f"{request.param}.gguf"), 0, chat=False)
    yield model
    model.close()


@pytest.mark.parametrize("cache_bytes", [0, 4 * MIB])
def test_the_prompt_is_computed_once(tiny: Model, cache_bytes: int) -> None:
    """Batches are counted: those of one prompt, and one for each token, whether or not prompts are
    kept from job to job. Each answer has its own seed."""
    with running(tiny, cache_bytes=cache_bytes) as engine:
        run = Run(engine, n=4)
        generation = run.generation()
        tokens = sum(sampler.count for sampler in run.samplers)
        # Where the state is kept before its last token, that token has a batch of its own.
        prompt = math.ceil((len(run.prompt) - 1) / N_BATCH) + 1
        assert engine.steps <= prompt + tokens
        assert generation.prompt_tokens == len(run.prompt)
        assert len({*run.texts}) == 4
        endings = generation.endings
        assert generation.completion_tokens == sum(one.completion_tokens for one in endings)
        run.check_each_alone()


def test_a_prompt_of_one_token(tiny: Model) -> None:
    with running(tiny) as engine:
        run = Run(engine, "x", n=3, max_tokens=5)
        assert len(run.prompt) == 1
        assert [one.completion_tokens for one in run.generation().endings] == [5, 5, 5]


def test_a_known_prompt(tiny: Model) -> None:
    """All of it but the last token may be in the slot, or in host memory, when the job begins."""
    with running(tiny, cache_bytes=4 * MIB) as engine:
        for _ in range(3):
            run = Run(engine, n=3)
            assert run.generation().prompt_tokens == len(run.prompt)
        run.check_each_alone()


def test_answers_beside_other_sequences(tiny: Model) -> None:
    """Those that come and go in other slots change nothing."""
    with running(tiny, slots=3, cache_bytes=4 * MIB) as engine:
        others = [Run(engine, PROMPT[: 40 * number], max_tokens=30) for number in (1, 2, 3)]
        run = Run(engine, n=3)
        others += [Run(engine, "another " * number, max_tokens=12) for number in (60, 9, 5)]
        for other in others:
            other.generation()
        run.generation()
        run.check_each_alone()


def test_an_abort_between_answers(tiny: Model) -> None:
    """It ends all of them, and the slot serves the next."""
    with running(tiny) as engine:
        run = Run(engine, n=8, max_tokens=200, ignore_eos=True)
        eventually(lambda: run.texts[2], "a token of the third answer")
        engine.abort(run.sequence)
        assert isinstance(run.outcome(), Aborted)
        after = Run(engine, n=2)
        after.generation()
        after.check_each_alone()


def test_more_slots_between_answers(tiny: Model) -> None:
    """Where llama.cpp can take the state along; otherwise that is refused, and the answers come."""
    with running(tiny) as engine:
        run = Run(engine, n=8, max_tokens=100, ignore_eos=True)
        eventually(lambda: run.texts[2], "a token of the third answer")
        engine.grow(2).exception(PATIENCE_S)
        run.generation()
        run.check_each_alone()


class Eager(Speculation):
    """Checks all drafts, whatever they cost."""

    def counts(self, sequences: Any, room: int) -> list[int]:
        return [min(room // len(sequences), len(one.draft)) for one in sequences]

    def observe(self, sequences: int, drafts: int, seconds: float) -> None:
        pass


def test_an_answer_is_guessed_from_the_one_before(model: Model) -> None:
    """At temperature 0 they are the same, and each takes far fewer batches than it has tokens."""
    with running(model, speculation=Eager()) as engine:
        run = Run(engine, n=4, temperature=0, max_tokens=40)
        generation = run.generation()
        assert len({*run.texts}) == 1
        first = generation.endings[0].completion_tokens
        assert generation.completion_tokens == 4 * first
        assert engine.steps < math.ceil(len(run.prompt) / N_BATCH) + 2 * first


def test_answers_are_guessed_from_those_of_an_earlier_job(model: Model) -> None:
    """Also the first: all together take far fewer batches than one has tokens."""
    with running(model, speculation=Eager(), cache_bytes=MIB) as engine:
        first = Run(engine, n=3, temperature=0, max_tokens=60)
        first.generation()
        steps = engine.steps
        second = Run(engine, n=3, temperature=0, max_tokens=60)
        generation = second.generation()
        assert second.texts == first.texts
        assert engine.steps - steps < generation.endings[0].completion_tokens
        second.check_each_alone()


def test_every_option_is_of_each_answer(model: Model) -> None:
    """A schema, a stop string, and the least and the most tokens."""
    with running(model) as engine:
        form = schema_format({"type": "object", "properties": {"a": {"type": "integer"}}})
        run = Run(engine, n=4, response_format=form, max_tokens=500)
        reasons = [ending.finish_reason for ending in run.generation().endings]
        assert reasons == ["stop"] * 4
        assert all(isinstance(json.loads(text), dict) for text in run.texts)

        plain = Run(engine, n=3)
        plain.generation()
        stop = plain.texts[1][8:12]
        stopped = Run(engine, n=3, stop=[stop])
        stopped.generation()
        assert stopped.texts == [text.partition(stop)[0] for text in plain.texts]

        wanted = dict.fromkeys(engine.model.vocabulary.ends, 100.0)
        least = Run(engine, n=3, min_tokens=7, logit_bias=wanted)
        assert [one.completion_tokens for one in least.generation().endings] == [7, 7, 7]
        empty = Run(engine, n=3, logit_bias=wanted)
        assert [one.completion_tokens for one in empty.generation().endings] == [0, 0, 0]
        assert empty.texts == ["", "", ""]


def test_too_many_tokens_for_the_context(model: Model) -> None:
    """Each answer may fill what the prompt leaves."""
    with running(model, n_ctx=256) as engine:
        run = Run(engine, n=3, max_tokens=2**31 - 1, ignore_eos=True)
        left = 256 - len(run.prompt)
        assert [one.completion_tokens for one in run.generation().endings] == [left] * 3
