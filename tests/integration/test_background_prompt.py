"""A prompt that is computed in the background, on some of the threads, while others go on: real
contexts, and a real engine."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import pytest

from services.inferer.engine.background_prompt import BackgroundPrompt
from services.inferer.engine.context import ABORTED, DECODED, NOT_SET, SET, ContextOptions
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation
from services.inferer.engine.model import Model
from services.inferer.engine.scheduler import Chunk, PromptShare
from services.inferer.engine.separate_contexts import SeparateContexts
from services.inferer.engine.sequence import Aborted, Sequence
from services.inferer.engine.thread_pool import ThreadPools
from shared.errors import ModelError
from tests.integration.test_engine import ROUNDING, Run, behind, running, start, wait_until
from tests.support.architectures import write_mamba
from tests.support.tiny_model import write_tiny_model

PATIENCE_S = 60.0
TOKEN_S = 0.01
OPTIONS = ContextOptions(n_ctx=512, n_batch=128, threads=2)


def chunk(slot: int, size: int, position: int = 0) -> Chunk[Sequence]:
    sequence = Sequence()
    sequence.slot, sequence.position = slot, position
    sequence.tokens = [7 + slot] * (position + size)
    return Chunk(sequence, size, True, [])


class Contexts(SeparateContexts):
    """With an abort flag, and pools that are closed with them."""

    def __init__(self, model: Model, slots: int, threads: int) -> None:
        self.abort_flag = ctypes.create_string_buffer(2)
        self.pools = ThreadPools(threads)
        options = OPTIONS._replace(threads=threads)
        super().__init__(model, slots, options, self.abort_flag, self.pools)

    def close(self) -> None:
        super().close()
        self.pools.close()

    def logits(self, slot: int) -> numpy.ndarray:
        context, row = self.output(slot)
        native = llama_cpp.llama_get_logits_ith(context, row)
        return numpy.ctypeslib.as_array(native, shape=(49152,))[:1000].copy()


@pytest.fixture(params=[2, 3, 4])
def contexts(model: Model, request: pytest.FixtureRequest) -> Iterator[Contexts]:
    three = Contexts(model, 3, request.param)
    yield three
    three.close()


def in_background(
    contexts: SeparateContexts,
    part: Chunk[Sequence],
    beside: Callable[[], None],
    flag: bytes = NOT_SET,
) -> int:
    """Compute ``part`` on another thread, and do something ``beside``; its status."""
    abort_flag = ctypes.create_string_buffer(flag, 2)
    compute = contexts.begin_background(part, abort_flag)
    statuses: list[int] = []
    # A daemon: it may never return from llama.cpp.
    thread = threading.Thread(target=lambda: statuses.append(compute()), daemon=True)
    thread.start()
    beside()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it does not return"
    contexts.end_background()
    return statuses[0]


def test_both_have_the_outputs_that_they_have_alone(contexts: Contexts) -> None:
    def steps() -> None:
        for position in range(20, 30):
            assert contexts.decode([chunk(0, 1, position)]) == DECODED

    assert contexts.decode([chunk(0, 20)]) == DECODED
    assert in_background(contexts, chunk(1, 100), steps) == DECODED
    found = [contexts.logits(slot) for slot in (0, 1)]
    for slot in (0, 1):
        contexts.truncate(slot, 0)
    assert contexts.decode([chunk(1, 100)]) == DECODED
    assert contexts.decode([chunk(0, 30)]) == DECODED
    for slot in (0, 1):
        assert numpy.abs(contexts.logits(slot) - found[slot]).max() < ROUNDING
    assert numpy.abs(found[0] - found[1]).max() > ROUNDING


def test_slots_change_their_places_many_times(model: Model) -> None:
    """Each context computes in the background, beside others, and with all threads: with several
    threads for each, one that is paused in the wrong moment would stop everything."""
    contexts = Contexts(model, 3, threads=4)
    done: list[int] = []

    def work() -> None:
        for turn in range(24):
            slot = turn % 3
            others = [(slot + 1) % 3, (slot + 2) % 3]

            def steps(others: list[int] = others) -> None:
                for _ in range(2):
                    batch = [chunk(one, 1, contexts.length(one)) for one in others]
                    assert contexts.decode(batch) == DECODED
                    contexts.pools.pause()

            part = chunk(slot, 5, contexts.length(slot))
            assert in_background(contexts, part, steps) == DECODED
            assert contexts.decode([chunk(slot, 1, contexts.length(slot))]) == DECODED
            done.append(turn)
            if turn % 6 == 5:
                for one in range(3):
                    contexts.truncate(one, 0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        before = len(done)
        thread.join(PATIENCE_S)
        assert len(done) > before, "it stands still"
    assert len(done) == 24
    contexts.close()


def test_each_has_an_abort_flag_of_its_own(contexts: Contexts) -> None:
    def step() -> None:
        assert contexts.decode([chunk(0, 1)]) == DECODED

    def aborted() -> None:
        contexts.abort_flag[0] = SET
        assert contexts.decode([chunk(0, 1, 1)]) == ABORTED

    assert in_background(contexts, chunk(1, 100), step, SET) == ABORTED
    contexts.truncate(1, 0)
    assert in_background(contexts, chunk(1, 100), aborted) == DECODED
    # In a batch like any other, its own flag does not count any more.
    assert contexts.decode([chunk(1, 1, 100)]) == ABORTED
    contexts.abort_flag[0] = NOT_SET
    contexts.truncate(1, 100)
    assert contexts.decode([chunk(1, 1, 100)]) == DECODED


@pytest.mark.parametrize(
    ("threads", "beside", "shares"),
    [(2, [0], [1]), (3, [0], [2]), (5, [0, 2], [1, 1]), (8, [0], [4]), (8, [2, 0], [2, 2])],
)
def test_the_background_has_half_of_the_threads(
    threads: int, beside: list[int], shares: list[int]
) -> None:
    pools = ThreadPools(threads)
    before = pools.for_slots([0, 1])
    reserved = pools.reserve(1, threads // 2)
    assert reserved.threads == threads // 2
    assert pools.free == threads - threads // 2
    given = pools.for_slots(beside)
    assert [pool.threads for pool in given] == shares
    assert reserved not in given
    assert pools.all not in given
    pools.release()
    assert pools.free == threads
    assert pools.for_slots([0, 1]) == before
    assert pools.for_slots([0]) == [pools.all]
    pools.close()


def test_only_contexts_of_their_own_have_a_background(model: Model) -> None:
    for slots, threads, batching, has_one in (
        (2, 2, "off", True),
        (2, 1, "off", False),
        (2, 2, "on", False),
        (1, 2, "off", False),
    ):
        with running(model, slots=slots, threads=threads, batching=batching) as engine:  # type: ignore[arg-type]
            assert engine._memory.has_background is has_one


@pytest.fixture
def share_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts have always had their share: beside answers they are only in the background."""
    monkeypatch.setattr(PromptShare, "is_used_up", True)


@pytest.fixture
def engine(model: Model, share_is_used_up: None) -> Iterator[Engine]:
    with running(model, slots=3, threads=2, batching="off", n_batch=256) as three_slots:
        yield three_slots


def words(engine: Engine, word: str, count: int) -> list[int]:
    return engine.model.tokenize(f"{word} " * count)[:count]


def long_answer(engine: Engine) -> Run:
    """As slow as that of a larger model: it has not ended when the other things have."""
    stream = start(engine, "another prompt", max_tokens=3900, temperature=0, ignore_eos=True)

    def pass_on(text: str) -> None:
        time.sleep(TOKEN_S)
        stream.texts.append(text)

    stream.sequence.on_text = pass_on
    wait_until(lambda: len(stream.texts) > 10, "it is under way")
    return stream


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """What is computed in the background waits until the end of the block."""
    release = threading.Event()
    memory = engine._memory
    begin = memory.begin_background

    def begin_held(*arguments: Any) -> Callable[[], int]:
        compute = begin(*arguments)

        def compute_later() -> int:
            assert release.wait(PATIENCE_S)
            return compute()

        return compute_later

    memory.begin_background = begin_held  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        memory.begin_background = begin  # type: ignore[method-assign]
        release.set()


def begin_in_background(engine: Engine, prompt: list[int], **options: Any) -> Run:
    """A job of whose prompt a chunk is in the background: while it is `held`."""
    run = start(engine, prompt, **options)
    wait_until(lambda: engine._background.sequence is run.sequence, "it is in the background")
    return run


def test_each_sequence_has_its_own_tokens(engine: Engine) -> None:
    """Those that it has alone, whatever is computed in the background."""
    stream = long_answer(engine)
    runs = [
        start(engine, words(engine, word, 1500), temperature=0, max_tokens=50)
        for word in ("one", "two", "three", "four")
    ]
    for run in runs:
        assert run.generation().completion_tokens == 50
    assert engine._background.chunks > 10
    assert not stream.done
    engine.abort(stream.sequence)
    stream.outcome()
    with running(engine.model) as alone:
        for run in (*runs, stream):
            assert behind(alone, run) < ROUNDING


def test_a_stream_goes_on_beside_a_long_prompt(engine: Engine) -> None:
    """While a chunk is computed, the stream has many tokens."""
    stream = long_answer(engine)
    with held(engine):
        run = begin_in_background(engine, words(engine, "one", 1500), max_tokens=1)
        tokens, position = len(stream.texts), run.sequence.position
        wait_until(lambda: len(stream.texts) > tokens + 20, "the stream goes on")
        assert run.sequence.position == position
    run.generation()


def test_an_abort_in_the_background_leaves_the_others_alone(engine: Engine) -> None:
    stream = long_answer(engine)
    for number in range(10):
        with held(engine):
            prompt = words(engine, "two", 3500)
            victim = begin_in_background(engine, prompt, max_tokens=500, ignore_eos=True)
            if number % 2:
                engine.abort(victim.sequence)
        if not number % 2:  # llama.cpp computes it
            engine.abort(victim.sequence)
        assert isinstance(victim.outcome(), Aborted)
        assert engine._abort_flag.raw[:1] == NOT_SET, "the stream is not interrupted"
        assert not stream.done
    engine.abort(stream.sequence)
    stream.outcome()
    with running(engine.model) as alone:
        assert behind(alone, stream) < ROUNDING


def test_an_abort_does_not_wait_for_the_background(
    tmp_path: Path, share_is_used_up: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where llama.cpp cannot undo what it has computed: nothing of the prompt is kept."""
    outcomes: list[int | Exception] = []
    take = BackgroundPrompt.take

    def noting(self: BackgroundPrompt) -> Any:
        taken = take(self)
        outcomes.append(taken[1])
        return taken

    model = Model(write_mamba(tmp_path / "mamba.gguf"), gpu_layers=0)
    monkeypatch.setattr(BackgroundPrompt, "take", noting)
    with running(model, slots=3, threads=2, batching="off", n_batch=256) as engine:
        stream = long_answer(engine)
        with held(engine):
            victim = begin_in_background(engine, words(engine, "two", 1500))
            engine.abort(victim.sequence)
            flag = engine._background._abort_flag
            wait_until(lambda: flag.raw[:1] == SET, "it is aborted")
        assert isinstance(victim.outcome(), Aborted)
        assert outcomes == [ABORTED]
        again = start(engine, words(engine, "two", 1500), max_tokens=5, temperature=0)
        assert again.generation().completion_tokens == 5
        assert not stream.done
        with running(model) as alone:
            assert behind(alone, again) < ROUNDING
    model.close()


def test_aborts_of_others_do_not_stop_the_background(engine: Engine) -> None:
    stream = long_answer(engine)
    run = start(engine, words(engine, "one", 3500), max_tokens=5, temperature=0)
    while not run.done:
        victim = start(engine, "word", max_tokens=100)
        wait_until(lambda: victim.texts or run.done, "it has a slot")  # noqa: B023
        engine.abort(victim.sequence)
        victim.outcome()
    assert run.generation().completion_tokens == 5
    engine.abort(stream.sequence)
    stream.outcome()
    with running(engine.model) as alone:
        assert behind(alone, run) < ROUNDING


def test_the_prompt_goes_on_when_the_stream_ends(engine: Engine) -> None:
    stream = long_answer(engine)
    with held(engine):
        prompt = words(engine, "one", 3500)
        run = begin_in_background(engine, prompt, max_tokens=5, temperature=0)
        engine.abort(stream.sequence)
        stream.outcome()
    assert run.generation().completion_tokens == 5
    with running(engine.model) as alone:
        assert behind(alone, run) < ROUNDING


def test_a_growth_does_not_wait_for_the_background(engine: Engine) -> None:
    """What was computed of the chunk is computed again."""
    stream = long_answer(engine)
    runs = []
    for slots in (4, 5):
        with held(engine):
            prompt = words(engine, "one", 3500)
            run = begin_in_background(engine, prompt, max_tokens=5, temperature=0)
            grown = engine.grow(slots)
        grown.result(PATIENCE_S)
        assert run.generation().completion_tokens == 5
        runs.append(run)
    assert not stream.done
    engine.abort(stream.sequence)
    stream.outcome()
    with running(engine.model) as alone:
        for each in (*runs, stream):
            assert behind(alone, each) < ROUNDING


@pytest.mark.parametrize("write", [write_tiny_model, write_mamba])
def test_close_ends_the_background(
    tmp_path: Path, share_is_used_up: None, write: Callable[[Path], Path]
) -> None:
    model = Model(write(tmp_path / "model.gguf"), gpu_layers=0)
    engine = Engine(model, slots=2, n_ctx=4096, n_batch=256, threads=2, batching="off")
    stream = long_answer(engine)
    with held(engine):
        run = begin_in_background(engine, words(engine, "one", 3500))
        closing = threading.Thread(target=engine.close)
        closing.start()
        flag = engine._background._abort_flag
        wait_until(lambda: flag.raw[:1] == SET, "it is aborted")
    closing.join(PATIENCE_S)
    assert isinstance(stream.outcome(), Aborted)
    assert isinstance(run.outcome(), Aborted)
    model.close()


@pytest.mark.parametrize("failure", [MemoryError("no memory"), -3])
def test_a_failure_in_the_background_is_one_of_its_sequence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Exception | int
) -> None:
    run_in_background = BackgroundPrompt._run

    def fails(self: BackgroundPrompt, compute: Callable[[], int]) -> None:
        def failing() -> int:
            compute()
            if isinstance(failure, Exception):
                raise failure
            return failure

        run_in_background(self, failing)

    stream = long_answer(engine)
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundPrompt, "_run", fails)
        run = start(engine, words(engine, "one", 3500))
        outcome = run.outcome()
    assert isinstance(outcome, ModelError)
    again = start(engine, words(engine, "two", 1000), max_tokens=5)
    assert isinstance(again.outcome(), Generation)
    assert not stream.done


def test_an_error_of_a_batch_ends_the_background_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that run get it, as always, and the engine goes on."""
    stream = long_answer(engine)
    with held(engine), monkeypatch.context() as patch:
        run = begin_in_background(engine, words(engine, "one", 3500))

        def decode(batch: object) -> int:
            raise RuntimeError("broken")

        patch.setattr(engine._memory, "decode", decode)
        flag = engine._background._abort_flag
        wait_until(lambda: flag.raw[:1] == SET, "it is aborted")
    assert isinstance(stream.outcome(), ModelError)
    assert isinstance(run.outcome(), ModelError)
    again = start(engine, words(engine, "two", 1000), max_tokens=5)
    assert isinstance(again.outcome(), Generation)


def test_an_error_after_the_background_is_one_of_its_sequence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has just ended when the engine grows."""
    stream = long_answer(engine)
    begun, release = threading.Event(), threading.Event()
    rest = engine._memory.decode
    with held(engine):
        run = begin_in_background(engine, words(engine, "one", 20), max_tokens=5)

        def fails(context: object, row: int) -> int:
            raise RuntimeError("broken")

        def decode(batch: Any) -> int:
            begun.set()
            assert release.wait(PATIENCE_S)
            return rest(batch)

        monkeypatch.setattr(run.sampler, "sample", fails)
        monkeypatch.setattr(engine._memory, "decode", decode)
        assert begun.wait(PATIENCE_S)
    wait_until(lambda: engine._background.has_ended, "it was computed")
    grown = engine.grow(4)
    release.set()
    assert isinstance(run.outcome(), ModelError)
    grown.result(PATIENCE_S)
    tokens = len(stream.texts)
    wait_until(lambda: len(stream.texts) > tokens + 10, "the stream goes on")


def test_a_thread_that_does_not_start_does_not_stop_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_answer(engine)
    prompt = words(engine, "one", 1500)
    with monkeypatch.context() as patch:
        begin = BackgroundPrompt.begin

        def fails(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        def failing(*arguments: Any) -> None:
            with monkeypatch.context() as inner:
                inner.setattr(threading.Thread, "start", fails)
                begin(*arguments)

        patch.setattr(BackgroundPrompt, "begin", failing)
        assert isinstance(start(engine, prompt).outcome(), ModelError)
    stream = long_answer(engine)
    assert isinstance(start(engine, prompt, max_tokens=5).outcome(), Generation)
    assert not stream.done
    assert engine._background.chunks


def test_the_background_has_a_counter_of_its_own(engine: Engine) -> None:
    """So a call of llama.cpp that never returns is noticed, although the others go on."""
    long_answer(engine)
    with held(engine):
        run = begin_in_background(engine, words(engine, "one", 1500), max_tokens=1)
        before = engine.in_progress
        wait_until(
            lambda: engine.in_progress["compute"] > before["compute"] + 5, "the others go on"
        )
        assert engine.in_progress["background"] == before["background"]
    run.generation()
    assert "background" not in engine.in_progress


def test_what_is_being_computed_is_shared(model: Model, share_is_used_up: None) -> None:
    """A job that begins like the one in the background gets its slot after the chunk, with what
    was computed."""
    engine = Engine(
        model, slots=3, n_ctx=4096, n_batch=256, threads=2, batching="off", cache_bytes=10**8
    )
    stream = long_answer(engine)
    prompt = words(engine, "one", 1500)
    with held(engine):
        run = begin_in_background(engine, prompt, max_tokens=5, temperature=0)
        other = start(engine, [*prompt, 5], max_tokens=5, temperature=0)
        tokens = len(stream.texts)
        wait_until(lambda: len(stream.texts) > tokens + 10, "the stream goes on")
        position = run.sequence.position
    assert other.generation().cached_tokens > position
    engine.abort(stream.sequence)
    stream.outcome()
    for each in (run, other):
        assert behind(engine, each) < ROUNDING
    assert engine.close()
