"""LoRA adapters on the real llama.cpp: what each gives alone, side by side and from the cache."""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import gguf
import llama_cpp
import numpy
import pytest
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.lookup import Lookup
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.self_test import AllDrafts
from services.inferer.engine.sequence import Sequence as TokenSequence
from services.inferer.engine.speculation import Speculation
from services.inferer.settings import Batching
from shared.errors import SettingsError
from shared.wire.requests import Sampling
from tests.support.drafts import is_from_answers
from tests.support.lora import write_lora
from tests.support.pooled_models import write_bert
from tests.support.tiny_model import write_tiny_model

MIB = 1024**2
PATIENCE_S = 60.0
N_CTX = 2048
ROUNDING = 0.3
"""Logits: more than batches are rounded differently, far less than lies between two adapters."""
NONE, FIRST, SECOND = "", "first", "second"
TEXT = "You are a careful assistant. " * 20


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The tiny model with two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate((FIRST, SECOND)):
        write_lora(folder / f"{name}.gguf", seed=seed)
    (folder / "README.md").write_text("not an adapter")
    model = Model(tiny_model, 0, adapters=folder)
    assert list(model.adapters) == [FIRST, SECOND]
    yield model
    model.close()


class Greedy(Sampler):
    """Takes the best token, or what is ``forced``, and keeps the logits of each."""

    def __init__(self, model: Model, prompt: list[int], forced: Sequence[int]) -> None:
        super().__init__(model, Sampling(temperature=0), 1, prompt)
        self._forced = forced
        self.chosen: list[int] = []
        self.logits: list[NDArray[numpy.float32]] = []

    def sample(self, context: object, row: int) -> int:
        self.logits.append(self._logits(context, row).copy())
        forced = self._forced[len(self.chosen) :]
        self.chosen.append(forced[0] if forced else int(self.logits[-1].argmax()))
        return self.chosen[-1]


class Run:
    """A sequence in the engine."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        adapter: str,
        max_tokens: int = 6,
        forced: Sequence[int] = (),
    ) -> None:
        self.prompt, self.adapter = prompt, adapter
        self.sampler = Greedy(engine.model, prompt, forced)
        self._ended: Future[Generation | Exception] = Future()
        self.sequence = GenerationSequence(
            lambda: (prompt, [self.sampler]), max_tokens, [], lambda _: None, self._ended.set_result
        )
        self.sequence.adapter = adapter
        engine.submit(self.sequence)

    def cached(self) -> int:
        outcome = self._ended.result(PATIENCE_S)
        assert isinstance(outcome, Generation), outcome
        return outcome.cached_tokens

    def is_right(self, model: Model) -> bool:
        """Whether all its logits are those that plain calls of llama.cpp give."""
        self.cached()
        wanted = plain_logits(model, self.prompt, self.sampler.chosen, self.adapter)
        return bool(abs(numpy.array(self.sampler.logits) - wanted).max() < ROUNDING)


def plain_logits(
    model: Model, prompt: list[int], chosen: list[int], adapter: str
) -> NDArray[numpy.float32]:
    """The logits after ``prompt`` and after each of the tokens ``chosen``, but the last, in a
    context of their own."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = N_CTX
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model.handle, parameters)
    if adapter:
        one = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(model.adapters[adapter])
        llama_cpp.llama_set_adapters_lora(context, one, 1, (llama_cpp.ctypes.c_float * 1)(1.0))
    tokens = prompt + chosen[:-1]
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row], batch.seq_id[row][0] = token, row, 0
        batch.n_seq_id[row], batch.logits[row] = 1, row >= len(prompt) - 1
    batch.n_tokens = len(tokens)
    assert llama_cpp.llama_decode(context, batch) == 0
    native = llama_cpp.llama_get_logits(context)
    found = numpy.ctypeslib.as_array(native, shape=(len(chosen), model.vocabulary.size)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return found


@contextmanager
def running(
    model: Model,
    slots: int = 1,
    cache_bytes: int = 64 * MIB,
    speculation: Speculation | None = None,
    batching: Batching = "on",
) -> Iterator[Engine]:
    engine = Engine(
        model,
        slots=slots,
        n_ctx=N_CTX,
        n_batch=64,
        threads=1,
        batching=batching,
        cache_bytes=cache_bytes,
        speculation=speculation,
    )
    try:
        yield engine
    finally:
        assert engine.close()


def test_each_adapter_gives_something_else(adapted: Model) -> None:
    """Or the tests below would show nothing."""
    prompt = adapted.tokenize("tell me")
    logits = [plain_logits(adapted, prompt, [0], name) for name in (NONE, FIRST, SECOND)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(logits[one] - logits[other]).max() > 10 * ROUNDING


def test_one_after_the_other(adapted: Model) -> None:
    with running(adapted) as engine:
        for adapter in (NONE, FIRST, NONE, SECOND, FIRST, FIRST, NONE):
            run = Run(engine, adapted.tokenize("tell me"), adapter)
            assert run.is_right(adapted)


@pytest.mark.parametrize("batching", ["on", "off"])
def test_side_by_side(adapted: Model, batching: Batching) -> None:
    """Each is what it is alone, while they take turns many times."""
    with running(adapted, slots=4, batching=batching) as engine:
        prompts = [adapted.tokenize(f"tell me {number}") for number in range(4)]
        adapters = (NONE, FIRST, SECOND, FIRST)
        runs = [Run(engine, p, a, 300) for p, a in zip(prompts, adapters, strict=True)]
        assert all(run.is_right(adapted) for run in runs)
        assert len({tuple(run.sampler.chosen) for run in runs}) == len(runs)


def test_what_one_adapter_computed_is_not_used_for_another(adapted: Model) -> None:
    """Neither what its slot holds nor what is in host memory nor what it computes just now; but it
    is for the same one."""
    prompt = adapted.tokenize(TEXT)
    with running(adapted) as engine:
        for count, adapters in ((0, (NONE, FIRST, SECOND)), (len(prompt) - 1, (NONE, FIRST))):
            for adapter in adapters:
                run = Run(engine, prompt, adapter)
                assert run.cached() == count
                assert run.is_right(adapted)
    with running(adapted, slots=2) as engine:
        long = Run(engine, prompt, FIRST, 300)
        other = Run(engine, prompt, SECOND)
        assert other.cached() == 0
        assert other.is_right(adapted)
        assert long.is_right(adapted)


@pytest.mark.parametrize("batching", ["on", "off"])
def test_growth_and_moves_keep_the_adapter(adapted: Model, batching: Batching) -> None:
    """A context with more slots begins with none."""
    with running(adapted, slots=2, batching=batching) as engine:
        runs = [Run(engine, adapted.tokenize(f"tell {n}"), FIRST, 40 + 200 * n) for n in (0, 1)]
        runs[0].cached()
        engine.grow(4).result(PATIENCE_S)
        runs += [Run(engine, adapted.tokenize("tell me"), name, 100) for name in (NONE, SECOND)]
        assert all(run.is_right(adapted) for run in runs)


def test_guessed_tokens_are_checked_with_the_adapter(adapted: Model) -> None:
    """Also wrong ones."""
    with running(adapted, slots=2, speculation=AllDrafts()) as engine:
        runs = [Run(engine, adapted.tokenize("a b a b a b"), name, 100) for name in (NONE, FIRST)]
        assert all(run.is_right(adapted) for run in runs)
        assert all(isinstance(run.sequence.lookup, Lookup) for run in runs)


class Watching(AllDrafts):
    """Counts the drafts from earlier answers."""

    from_answers = 0

    def counts(self, sequences: Collection[TokenSequence], room: int) -> list[int]:
        self.from_answers += sum(map(is_from_answers, sequences))
        return super().counts(sequences, room)


def test_tokens_are_guessed_from_answers_with_the_same_adapter_only(adapted: Model) -> None:
    """Whatever is in them: here all have the same tokens."""
    watching, forced = Watching(), range(100, 140)
    with running(adapted, speculation=watching) as engine:
        for is_known, adapters in ((False, (NONE, FIRST, SECOND)), (True, (FIRST, NONE))):
            for adapter in adapters:
                before = watching.from_answers
                run = Run(engine, adapted.tokenize("tell me"), adapter, 40, forced)
                assert run.is_right(adapted)
                assert (watching.from_answers > before) == is_known


@pytest.mark.parametrize("batching", ["on", "off"])
def test_random_jobs(adapted: Model, batching: Batching) -> None:
    """Beginnings in common, turns, aborts, with three slots."""
    choose = random.Random(3)
    with running(adapted, slots=3, cache_bytes=2 * MIB, batching=batching) as engine:
        runs: list[Run] = []
        for number in range(60):
            prompt = adapted.tokenize(TEXT[: choose.randint(1, len(TEXT))] + f" {number % 5}")
            run = Run(engine, prompt, choose.choice((NONE, FIRST, SECOND)), choose.randint(1, 30))
            if choose.random() < 0.15:
                engine.abort(run.sequence)
            else:
                runs.append(run)
        assert all(run.is_right(adapted) for run in runs)
        assert sum(run.cached() for run in runs) > 0


def wrong_type(path: Path, name: str) -> Path:
    return write_lora(path, metadata={name: GGUFValue(1, gguf.GGUFValueType.UINT32)})


def truncated(path: Path) -> Path:
    write_lora(path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def activated(path: Path) -> Path:
    tokens = GGUFValue([1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    return write_lora(path, metadata={"adapter.alora.invocation_tokens": tokens})


def without_weights(path: Path) -> Path:
    return write_lora(path, layers=0)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (
        lambda path: write_lora(path, architecture="gemma3"),
        "is not a LoRA adapter for this model: model arch and LoRA arch mismatch",
    ),
    "another size": (lambda path: write_lora(path, width=64), "has incorrect shape"),
    "more layers": (lambda path: write_lora(path, layers=3), "does not exist in base model"),
    "a model": (write_tiny_model, "expect general.type to be 'adapter'"),
    "text": (lambda path: path.write_text("hello, this is text"), "cannot be read: "),
    "nothing": (lambda path: path.touch(), "cannot be read: "),
    "a folder": (lambda path: path.mkdir(), "cannot be read: "),
    "cut off": (truncated, "is not a LoRA adapter for this model: "),
    "the type is a number": (
        lambda path: wrong_type(path, "general.type"),
        "has a field of the wrong type, general.type; convert it again",
    ),
    "alpha is a whole number": (
        lambda path: wrong_type(path, "adapter.lora.alpha"),
        "has a field of the wrong type, adapter.lora.alpha",
    ),
    "activated": (activated, "is an activated LoRA"),
    "no weights": (without_weights, "has no weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_no_adapter_for_the_model_is_refused(
    tiny_model: Path, tmp_path: Path, what: str
) -> None:
    """With its name and the reason, in one line."""
    write, reason = REFUSED[what]
    write(tmp_path / "bad.gguf")
    with pytest.raises(SettingsError) as caught:
        Model(tiny_model, 0, adapters=tmp_path)
    line = str(caught.value)
    assert line.startswith(f"INFERER_ADAPTERS: {tmp_path / 'bad.gguf'} ")
    assert reason in line
    assert "\n" not in line


def test_a_folder_without_adapters_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has 0 files \*\.gguf"):
        Model(tiny_model, 0, adapters=tmp_path)
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        Model(tiny_model, 0, adapters=tmp_path / "missing")
    write_lora(tmp_path / "two words.gguf")
    with pytest.raises(SettingsError, match="its name is not valid"):
        Model(tiny_model, 0, adapters=tmp_path)


def test_a_model_for_embeddings_takes_none(tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf", gguf.PoolingType.MEAN)
    with pytest.raises(SettingsError, match="adapters work only with models that generate text"):
        Model(path, 0, adapters=tmp_path)
