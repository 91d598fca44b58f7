"""``INFERER_BATCHING``: one context for all sequences, or one for each."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest
from structlog.testing import capture_logs

from services.inferer.engine import batching as batching_module
from services.inferer.engine import context
from services.inferer.engine.batching import MOST_SEPARATE, separate_is_faster
from services.inferer.engine.context import DECODED, Context, ContextOptions, EngineMemory
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.separate_contexts import SeparateContexts, keeps_threads_busy
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.set_up import start_engine
from services.inferer.engine.thread_pool import ThreadPools
from services.inferer.settings import Batching, InfererSettings
from shared.errors import OutOfMemory
from shared.wire.requests import Sampling
from tests.support.processes import eventually
from tests.support.tiny_model import write_tiny_model

OPTIONS = ContextOptions(n_ctx=256, n_batch=32, threads=2)
PATIENCE_S = 60.0
NO_ABORT = ctypes.create_string_buffer(2)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    tiny = Model(write_tiny_model(tmp_path / "tiny.gguf"), 0)
    yield tiny
    tiny.close()


@pytest.fixture
def pools() -> Iterator[ThreadPools]:
    two = ThreadPools(2)
    yield two
    two.close()


@pytest.fixture
def separate(model: Model, pools: ThreadPools) -> Iterator[SeparateContexts]:
    three = SeparateContexts(model, 3, OPTIONS, NO_ABORT, pools)
    yield three
    three.close()


def chunk(slot: int, size: int, position: int = 0) -> Chunk[Sequence]:
    sequence = Sequence()
    sequence.slot, sequence.position = slot, position
    sequence.tokens = [7] * (position + size)
    return Chunk(sequence, size, True, [])


@pytest.mark.parametrize(
    "sizes",
    [[1], [1, 1], [9, 9], [30, 2], [20, 1, 1], [9, 9, 1]],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_each_slot_has_the_outputs_of_its_own_sequence(
    model: Model, separate: SeparateContexts, sizes: list[int]
) -> None:
    """Generating and in their prompts, of even lengths and not: the same numbers as computed
    alone."""
    assert separate.decode([chunk(slot, size) for slot, size in enumerate(sizes)]) == DECODED
    assert [separate.length(slot) for slot in range(3)] == [*sizes, 0, 0][:3]
    for slot, size in enumerate(sizes):
        sampler = Sampler(model, Sampling(temperature=0), 1, [])
        chosen = sampler.sample(*separate.output(slot))
        sampler.close()
        alone = Context(model, 1, OPTIONS, NO_ABORT)
        assert alone.decode([chunk(0, size)]) == DECODED
        sampler = Sampler(model, Sampling(temperature=0), 1, [])
        assert sampler.sample(*alone.output(0)) == chosen
        sampler.close()
        alone.close()


@pytest.mark.parametrize(
    ("sizes", "threads", "pays"),
    [
        ([9], 2, False),
        ([9, 9], 1, False),
        ([9, 9], 2, True),
        ([10, 9], 2, True),
        ([30, 2], 2, False),
        ([9, 9], 3, False),
        ([9, 9, 9], 3, True),
        ([9, 9, 9, 2], 4, False),
        ([9, 9], 8, True),
        ([9, 9, 9], 8, False),
    ],
)
def test_prompts_are_side_by_side_where_that_keeps_the_threads_busy(
    sizes: list[int], threads: int, pays: bool
) -> None:
    """Not where one is much longer, and not where the threads cannot be divided evenly."""
    assert keeps_threads_busy(sizes, threads) is pays


def test_two_sequences_are_computed_on_two_threads(separate: SeparateContexts) -> None:
    helper = next(one for one in threading.enumerate() if one.name == "compute helper")
    stat = Path(f"/proc/self/task/{helper.native_id}/schedstat")
    before = int(stat.read_text().split()[0])
    for position in range(20):
        assert separate.decode([chunk(slot, 1, position) for slot in range(2)]) == DECODED
    assert int(stat.read_text().split()[0]) > before


def test_contexts_are_computed_with_others_each_time(model: Model) -> None:
    """With several threads for each: llama.cpp pauses the pool that a context used before, even
    when another context has just begun to use it."""
    pools = ThreadPools(4)
    contexts = SeparateContexts(model, 3, OPTIONS._replace(threads=4), NO_ABORT, pools)
    statuses: list[int] = []

    def compute() -> None:
        for step in range(40):
            slots = (step % 3, (step + 1) % 3)
            batch = [chunk(slot, 1, contexts.length(slot)) for slot in slots]
            statuses.append(contexts.decode(batch))

    # A daemon: it may never return from llama.cpp.
    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"stuck after {len(statuses)} batches"
    assert statuses == [DECODED] * 40
    contexts.close()
    pools.close()


@pytest.mark.parametrize("sizes", [[1], [5], [5, 5], [20, 1]])
def test_a_failure_is_one_of_the_batch(separate: SeparateContexts, sizes: list[int]) -> None:
    """Whichever thread it happens on, and whatever is computed after it: the last slot has no room
    for the token."""
    assert separate.decode([chunk(2, 20)]) == DECODED
    for position in range(20, OPTIONS.n_ctx, 4):
        assert separate.decode([chunk(2, 4, position)]) == DECODED
    others = [chunk(slot, size) for slot, size in enumerate(sizes)]
    assert separate.decode([*others, chunk(2, 1, OPTIONS.n_ctx)]) != DECODED
    for slot, size in enumerate(sizes):
        separate.truncate(slot, 0)
        assert separate.decode([chunk(slot, size)]) == DECODED


def test_an_exception_beside_reaches_the_caller(separate: SeparateContexts) -> None:
    """And the helper works on."""
    broken = separate._contexts[1]

    def compute() -> int:
        raise MemoryError

    broken.compute = compute  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(MemoryError):
            separate.decode([chunk(slot, 1) for slot in range(2)])
    del broken.compute
    for slot in range(2):
        separate.truncate(slot, 0)
    assert separate.decode([chunk(slot, 1) for slot in range(2)]) == DECODED


def helpers() -> int:
    return sum(thread.name == "compute helper" for thread in threading.enumerate())


def test_helpers_end_with_their_contexts(model: Model, pools: ThreadPools) -> None:
    before = helpers()
    contexts = SeparateContexts(model, 2, OPTIONS, NO_ABORT, pools)
    assert helpers() == before + 1
    contexts.close()
    eventually(lambda: helpers() == before or None, "the thread ends")


@pytest.mark.parametrize(
    ("threads", "slots", "shares"),
    [
        (8, [0], [8]),
        (8, [0, 1], [4, 4]),
        (5, [3, 1], [2, 2]),
        (5, [0, 1, 2], [1, 1, 1]),
        (2, [2, 0], [1, 1]),
    ],
)
def test_contexts_have_equal_shares_of_the_threads(
    threads: int, slots: list[int], shares: list[int]
) -> None:
    before = set(Path("/proc/self/task").iterdir())
    pools = ThreadPools(threads)
    given = pools.for_slots(slots)
    assert [pool.threads for pool in given] == shares
    assert len(set(given)) == len(slots)
    assert (pools.all in given) is (len(slots) == 1)
    assert pools.for_slots(slots) == given
    pools.close()
    assert set(Path("/proc/self/task").iterdir()) <= before


@pytest.mark.parametrize(
    ("batching", "slots", "memory"),
    [
        ("on", 2, Context),
        ("off", 1, Context),
        ("off", 2, SeparateContexts),
        ("off", MOST_SEPARATE + 1, SeparateContexts),
        ("auto", MOST_SEPARATE + 1, Context),
    ],
)
def test_the_setting_decides(
    model: Model, batching: Batching, slots: int, memory: type[EngineMemory]
) -> None:
    engine = Engine(model, slots=slots, n_ctx=256, n_batch=32, threads=2, batching=batching)
    assert type(engine._memory) is memory
    assert engine.close()


@pytest.mark.parametrize(("is_faster", "memory"), [(True, SeparateContexts), (False, Context)])
def test_what_was_measured_decides(
    model: Model, is_faster: bool, memory: type[EngineMemory]
) -> None:
    """It is not measured again; with very many slots it does not matter."""
    engine = Engine(model, slots=1, n_ctx=256, n_batch=32, threads=2, batching="auto")
    engine._separate_is_faster = is_faster
    for slots in (2, MOST_SEPARATE):
        engine.grow(slots).result(PATIENCE_S)
        assert type(engine._memory) is memory
    engine.grow(MOST_SEPARATE + 1).result(PATIENCE_S)
    assert type(engine._memory) is Context
    assert engine.close()


@pytest.mark.parametrize(
    ("slots", "expected_slots", "is_measured"), [(1, 1, False), (1, 4, True), (2, 2, True)]
)
def test_it_is_measured_at_the_start_if_several_slots_are_expected(
    model: Model, slots: int, expected_slots: int, is_measured: bool
) -> None:
    engine = Engine(
        model,
        slots=slots,
        n_ctx=256,
        n_batch=32,
        threads=2,
        batching="auto",
        expected_slots=expected_slots,
    )
    assert (engine._separate_is_faster is not None) is is_measured
    assert engine.close()


@pytest.mark.parametrize("slots", [2, 4, MOST_SEPARATE])
def test_both_ways_are_measured(model: Model, pools: ThreadPools, slots: int) -> None:
    """Whichever is faster here: both can be measured, and leave nothing behind."""
    before = helpers()
    with capture_logs() as logged:
        separate_is_faster(model, slots, OPTIONS, pools)
    assert [entry["event"] for entry in logged] == ["batching_measured"]
    eventually(lambda: helpers() == before or None, "the helpers end")


def test_the_turns_of_all_sequences_are_measured(
    separate: SeparateContexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of each of three, of which two are computed at once, takes one and a half batches."""
    clock = SimpleNamespace(perf_counter=iter((10.0, 12.0)).__next__)
    monkeypatch.setattr(batching_module, "time", clock)
    assert batching_module._step_s(separate, 3) == 3.0
    assert [separate.length(slot) for slot in range(3)] == [1, 1, 0]


def test_contexts_of_their_own_that_do_not_fit(model: Model) -> None:
    engine = Engine(model, slots=1, n_ctx=4096, n_batch=32, threads=2, batching="off")
    engine._options = engine._options._replace(n_ctx=2**24)
    with pytest.raises(OutOfMemory, match="no memory for 64 contexts"):
        engine.grow(64).result(PATIENCE_S)
    assert engine.close()


def test_one_context_where_several_do_not_fit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are asked for. Several take more: each has buffers of its own."""
    one = context.required_bytes(model, 4, OPTIONS)
    several = context.required_bytes(model, 4, OPTIONS, are_separate=True)
    assert one < several - 1
    ways: tuple[tuple[Batching, bool], ...] = (("auto", True), ("off", False))
    for batching, fits in ways:
        engine = Engine(model, slots=1, n_ctx=256, n_batch=32, threads=2, batching=batching)
        engine._separate_is_faster = True
        with monkeypatch.context() as patch:
            patch.setattr(context, "available_bytes", lambda: several - 1)
            grown = engine.grow(4)
            if fits:
                grown.result(PATIENCE_S)
            else:
                with pytest.raises(OutOfMemory, match="no memory for 4 contexts"):
                    grown.result(PATIENCE_S)
        assert type(engine._memory) is Context
        assert engine.slots == (4 if fits else 1)
        assert engine.close()


def test_contexts_that_were_created_are_freed_when_the_next_one_fails(
    model: Model, monkeypatch: pytest.MonkeyPatch, pools: ThreadPools
) -> None:
    """The check found room for all, but llama.cpp does not get it."""
    created: list[int] = []
    freed: list[int] = []
    create, free = context.create_context, llama_cpp.llama_free

    def third_fails(*args: Any) -> int:
        if len(created) == 2:
            raise OutOfMemory("no memory")
        created.append(create(*args))
        return created[-1]

    def note(handle: int) -> None:
        freed.append(handle)
        free(handle)

    before = helpers()
    context.required_bytes(model, 1, OPTIONS)  # creates contexts of its own, once
    monkeypatch.setattr(context, "create_context", third_fails)
    monkeypatch.setattr(llama_cpp, "llama_free", note)
    with pytest.raises(OutOfMemory):
        SeparateContexts(model, 4, OPTIONS, NO_ABORT, pools)
    assert freed == created
    eventually(lambda: helpers() == before or None, "the thread ends")


@pytest.mark.parametrize("threads", [1, 2])
def test_more_sequences_than_threads(model: Model, threads: int) -> None:
    """They take turns; each has the text that it has alone."""
    prompts = [[5, 6, token] for token in range(7, 12)]

    def texts(slots: int, batching: Batching) -> list[str]:
        engine = Engine(
            model, slots=slots, n_ctx=256, n_batch=32, threads=threads, batching=batching
        )
        texts = [""] * len(prompts)
        ended: list[Generation | Exception] = []
        for number, prompt in enumerate(prompts):

            def on_text(text: str, number: int = number) -> None:
                texts[number] += text

            samplers = [Sampler(model, Sampling(temperature=0), 1, prompt)]
            engine.submit(
                GenerationSequence(
                    lambda prompt=prompt, samplers=samplers: (prompt, samplers),  # type: ignore[misc]
                    50,
                    [],
                    on_text,
                    ended.append,
                )
            )
        eventually(lambda: len(ended) == len(prompts) or None, "all have ended")
        assert all(isinstance(outcome, Generation) for outcome in ended), ended
        assert engine.close()
        return texts

    assert texts(4, "off") == texts(1, "on")


def test_auto_computes_every_sequence(model: Model) -> None:
    """From one slot to four, then to very many, whichever way is chosen."""
    engine = Engine(model, slots=1, n_ctx=512, n_batch=32, threads=2, batching="auto")
    ended: list[Generation | Exception] = []
    for slots in (4, MOST_SEPARATE + 1):
        for _ in range(6):
            samplers = [Sampler(model, Sampling(temperature=0), 1, [5, 6])]
            engine.submit(
                GenerationSequence(
                    lambda samplers=samplers: ([5, 6], samplers),  # type: ignore[misc]
                    50,
                    [],
                    lambda text: None,
                    ended.append,
                )
            )
        engine.grow(slots).result(PATIENCE_S)
    eventually(lambda: len(ended) == 12 or None, "all have ended")
    assert all(isinstance(outcome, Generation) for outcome in ended), ended
    assert engine.close()


@pytest.mark.parametrize(("batching", "kind"), [("off", SeparateContexts), ("on", Context)])
def test_the_environment_decides(model: Model, batching: Batching, kind: type) -> None:
    engine = start_engine(InfererSettings(batching=batching), model, slots=2, speculation=None)
    assert type(engine._memory) is kind
    assert engine.close()
