"""The prompt cache on the real llama.cpp: the same text as without it, on four kinds of memory."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import llama_cpp
import numpy
import pytest

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted, State
from services.inferer.settings import Batching, KvType
from shared.model_files import locate
from shared.wire.requests import Sampling
from tests.support.architectures import write_hybrid, write_mamba, write_windowed
from tests.support.processes import eventually
from tests.support.tiny_model import write_tiny_model

MIB = 1024**2
PATIENCE_S = 60.0
ROUNDING = 0.1
"""Logits: more than batches are rounded differently, far less than lies between two prompts."""
WIDE = 128
"""The width of models whose heads, a fourth of it, have as many numbers as a block of q8_0."""
BEGINNING = "You are a careful assistant. " * 20
"""Far more tokens than the window of the tiny model that has one."""

KINDS: dict[str, Callable[[Path], Path]] = {
    "dense": write_tiny_model,
    "window": write_windowed,
    "hybrid": write_hybrid,
    "recurrent": write_mamba,
    "dense-q8_0": partial(write_tiny_model, width=WIDE),
    "window-q8_0": partial(write_windowed, width=WIDE),
}
KV_TYPES: dict[str, KvType] = {"dense-q8_0": "q8_0", "window-q8_0": "q8_0"}
"""How keys and values are stored, by the name of the model's file; f16 for all others."""


class Tracing(Sampler):
    """Greedy, or made to choose given tokens; notes by how much each was not the best."""

    def __init__(self, model: Model, prompt: list[int], forced: list[int] | None = None) -> None:
        super().__init__(model, Sampling(temperature=0), 1, prompt)
        self._size = model.vocabulary.size
        self._forced = forced
        self.chosen: list[int] = []
        self.behind: list[float] = []

    def sample(self, context: object, row: int) -> int:
        native = llama_cpp.llama_get_logits_ith(context, row)
        logits = numpy.ctypeslib.as_array(native, shape=(self._size,))
        forced = self._forced
        token = int(logits.argmax()) if forced is None else forced[len(self.chosen)]
        self.chosen.append(token)
        self.behind.append(float(logits.max() - logits[token]))
        return token


class Run:
    """A sequence in the engine."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        owner: str = "us",
        forced: list[int] | None = None,
        sequence_type: type[GenerationSequence] = GenerationSequence,
    ) -> None:
        self.prompt = prompt
        self.sampler = Tracing(engine.model, prompt, forced)
        self._ended: Future[Generation | Exception] = Future()
        self.sequence = sequence_type(
            lambda: (prompt, [self.sampler]), max_tokens, [], lambda _: None, self._ended.set_result
        )
        self.sequence.owner = owner
        self.sequence.is_cold = forced is not None
        engine.submit(self.sequence)

    def outcome(self) -> Generation | Exception:
        return self._ended.result(PATIENCE_S)

    def cached(self) -> int:
        outcome = self.outcome()
        assert isinstance(outcome, Generation), outcome
        return outcome.cached_tokens

    def generates(self) -> bool:
        return len(self.sampler.chosen) > 0


def aborted_in_its_prompt(engine: Engine) -> type[GenerationSequence]:
    """Sequences that ``engine`` aborts after the first batch. Another thread may come too late."""

    class AbortedSequence(GenerationSequence):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "position" and value:
                engine.abort(self)

    return AbortedSequence


@contextmanager
def running(
    model: Model,
    slots: int = 1,
    cache_bytes: int = 64 * MIB,
    n_ctx: int = 2048,
    n_batch: int = 64,
    batching: Batching = "on",
) -> Iterator[Engine]:
    engine = Engine(
        model,
        slots=slots,
        n_ctx=n_ctx,
        n_batch=n_batch,
        threads=1,
        batching=batching,
        kv_type=KV_TYPES.get(model.path.stem, "f16"),
        cache_bytes=cache_bytes,
    )
    try:
        yield engine
    finally:
        assert engine.close()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(KINDS[kind](tmp_path_factory.mktemp("kind") / f"{kind}.gguf"), 0)
    yield model
    model.close()


def assert_same_as_without(engine: Engine, run: Run) -> None:
    """Computed from the beginning the tokens of ``run`` are the best ones too, but for what
    batches of other sizes are rounded differently."""
    run.cached()
    chosen = run.sampler.chosen
    again = Run(engine, run.prompt, len(chosen), forced=chosen)
    assert again.cached() == 0
    assert max(again.sampler.behind, default=0) < ROUNDING


@pytest.mark.parametrize("batching", ["on", "off"])
def test_random_prompts_give_the_same_text_with_the_cache(tiny: Model, batching: Batching) -> None:
    """Prompts with shared beginnings, turns that continue an answer, aborts and growth."""
    run_random_prompts(tiny, batching)


@pytest.mark.parametrize("batching", ["on", "off"])
def test_random_prompts_where_each_sequence_has_windows_of_its_own(
    tmp_path: Path, batching: Batching
) -> None:
    model = Model(write_windowed(tmp_path / "window.gguf", original_context=4096), 0)
    run_random_prompts(model, batching, grows=batching == "off")
    model.close()


def run_random_prompts(tiny: Model, batching: Batching, *, grows: bool = True) -> None:
    choose = random.Random(7)
    beginnings = [tiny.tokenize(BEGINNING * count) for count in (1, 2, 3)]
    checked, cached = 0, 0
    with running(tiny, slots=2, cache_bytes=2 * MIB, batching=batching) as engine:
        history: list[Run] = []
        for number in range(250):
            if history and choose.random() < 0.4:
                earlier = choose.choice(history[-6:])
                earlier.outcome()
                prompt = [*earlier.prompt, *earlier.sampler.chosen]
                prompt = prompt[: choose.randint(1, len(prompt))][:1500]
            else:
                prompt = list(choose.choice(beginnings))
            prompt += tiny.tokenize(f"word {number} " * choose.randint(1, 9))
            run = Run(engine, prompt, choose.randint(1, 6))
            if choose.random() < 0.1:
                engine.abort(run.sequence)
                run.outcome()
                continue
            history.append(run)
            if number == 125 and grows:
                engine.grow(3).result(PATIENCE_S)
            if number % 4 == 0:
                assert_same_as_without(engine, run)
                checked += 1
        cached = sum(run.cached() for run in history)
    assert checked > 40
    assert cached > sum(len(run.prompt) for run in history) / 10


def test_the_second_turn_computes_only_what_is_new(tiny: Model) -> None:
    with running(tiny) as engine:
        first = Run(engine, tiny.tokenize(BEGINNING), 8)
        assert first.cached() == 0
        turn = [*first.prompt, *first.sampler.chosen]
        second = Run(engine, [*turn, *tiny.tokenize("and then?")])
        assert second.cached() == len(turn) - 1
        assert_same_as_without(engine, second)


def test_a_common_beginning_is_found_again(tiny: Model, kind: str) -> None:
    """At once where the memory can be cut; else from the third on, with the state that was saved
    where the first two part."""
    with running(tiny) as engine:
        common = tiny.tokenize(BEGINNING)
        runs = []
        for word in ("one", "two", "three", "four"):
            runs.append(Run(engine, [*common, *tiny.tokenize(f" {word}")]))
            runs[-1].cached()
        least = len(common) - 2  # the words may begin with the same token
        can_be_cut = kind not in ("hybrid", "recurrent")
        assert [run.cached() >= least for run in runs] == [False, can_be_cut, True, True]
        assert_same_as_without(engine, runs[-1])


def test_what_made_room_comes_back_from_host_memory(tiny: Model) -> None:
    """Two conversations in turn on one slot."""
    with running(tiny) as engine:
        prompts = [tiny.tokenize(f"{word} " * 200) for word in ("this", "that")]
        answers = []
        for prompt in prompts:
            run = Run(engine, prompt)
            run.cached()
            answers.append(run.sampler.chosen)
        for prompt, chosen in zip(prompts, answers, strict=True):
            run = Run(engine, [*prompt, *chosen, *tiny.tokenize("next")])
            assert run.cached() == len(prompt) + len(chosen) - 1
            assert_same_as_without(engine, run)


def test_a_beginning_is_shared_with_a_job_that_still_runs(tmp_path: Path) -> None:
    model = Model(write_tiny_model(tmp_path / "tiny.gguf"), 0)
    with running(model, slots=2) as engine:
        common = model.tokenize(BEGINNING)
        long = Run(engine, [*common, 5], 500)
        eventually(long.generates, "its first token")
        other = Run(engine, [*common, 6])
        assert other.cached() == len(common)
        assert_same_as_without(engine, other)
        assert_same_as_without(engine, long)
    model.close()


def test_another_owner_and_a_cold_job_compute_everything(tiny: Model) -> None:
    with running(tiny) as engine:
        prompt = tiny.tokenize(BEGINNING)
        assert Run(engine, prompt, owner="them").cached() == 0
        assert Run(engine, prompt, owner="us").cached() == 0


def test_nothing_is_kept_where_there_is_no_cache(tiny: Model) -> None:
    with running(tiny, cache_bytes=0) as engine:
        prompt = tiny.tokenize(BEGINNING)
        assert [Run(engine, prompt).cached() for _ in range(2)] == [0, 0]


def test_small_windows_give_the_same_text(tmp_path: Path) -> None:
    """Tokens that no layer sees any more make room for others, also where two sequences share the
    room, one is aborted and another slot is opened."""
    model = Model(write_windowed(tmp_path / "window.gguf"), 0)
    prompts = [model.tokenize(f"{word} " + BEGINNING * 3) for word in ("one", "two", "three")]
    with running(model, slots=2, cache_bytes=0) as engine:
        long = Run(engine, prompts[0], 100)
        eventually(long.generates, "its first token")
        aborted = Run(engine, prompts[1], 100)
        eventually(lambda: aborted.sequence.position > 0, "the first batch")
        engine.abort(aborted.sequence)
        engine.grow(3).result(PATIENCE_S)
        runs = [long, *(Run(engine, prompt, 30) for prompt in prompts)]
        assert [run.cached() for run in runs] == [0] * 4
    # With batches as long as the context, llama.cpp keeps all tokens.
    with running(model, n_batch=2048) as engine:
        for run in runs:
            assert_same_as_without(engine, run)
    model.close()


def test_an_abort_in_the_middle_of_a_prompt_leaves_what_was_computed(tiny: Model) -> None:
    with running(tiny, n_ctx=4096, n_batch=8) as engine:
        prompt = tiny.tokenize(BEGINNING * 30)[:3000]
        run = Run(engine, prompt, sequence_type=aborted_in_its_prompt(engine))
        outcome = run.outcome()
        computed = run.sequence.position
        again = Run(engine, prompt)
        assert isinstance(outcome, Aborted)
        assert 0 < computed < len(prompt)
        assert again.cached() == computed
        assert_same_as_without(engine, again)


def test_a_growth_keeps_what_is_known(tiny: Model) -> None:
    with running(tiny) as engine:
        first = Run(engine, tiny.tokenize(BEGINNING))
        first.cached()
        engine.grow(2).result(PATIENCE_S)
        turn = [*first.prompt, *first.sampler.chosen]
        second = Run(engine, [*turn, 7])
        assert second.cached() == len(turn) - 1
        assert_same_as_without(engine, second)


def test_running_sequences_are_moved_side_by_side(tmp_path: Path) -> None:
    """llama.cpp computes sequences together where their slots are adjacent. What was in the slot
    between them is kept."""
    model = Model(write_tiny_model(tmp_path / "tiny.gguf"), 0)
    with running(model, slots=3) as engine:
        prompts = [model.tokenize(f"{word} {BEGINNING}") for word in ("one", "two", "three")]
        runs = []
        for prompt in prompts:
            runs.append(Run(engine, prompt, 1500))
            eventually(runs[-1].generates, "its first token")
        first, short, last = runs
        assert [run.sequence.slot for run in runs] == [0, 1, 2]
        engine.abort(short.sequence)
        eventually(
            lambda: abs(first.sequence.slot - last.sequence.slot) == 1 or None, "they are adjacent"
        )
        assert first.sequence.state is last.sequence.state is State.RUNNING
        again = Run(engine, short.prompt)
        assert again.cached() == len(short.prompt) - 1
        for run in (again, first, last):
            assert_same_as_without(engine, run)
    model.close()


def test_longrope_with_two_slots_shares_beginnings(tmp_path: Path) -> None:
    model = Model(write_tiny_model(tmp_path / "longrope.gguf", longrope_from=4096), 0)
    with running(model, slots=2) as engine:
        prompt = model.tokenize(BEGINNING)
        long = Run(engine, prompt, 300)
        eventually(long.generates, "its first token")
        other = Run(engine, prompt)
        assert other.cached() == len(prompt) - 1
        assert_same_as_without(engine, other)
        assert_same_as_without(engine, long)
    model.close()


def test_gemma_beyond_its_window(tmp_path: Path) -> None:
    """The real one, with a window of 512 tokens."""
    model = Model(locate("gemma3-270m"), 0)
    with running(model) as engine:
        common = model.tokenize("The quick brown fox jumps over the lazy dog. " * 80)
        for word in ("cat", "cow", "hen"):
            run = Run(engine, [*common, *model.tokenize(word, add_special=False)])
            run.cached()
        assert run.cached() == len(common)
        assert_same_as_without(engine, run)
    model.close()
