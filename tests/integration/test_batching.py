"""``INFERER_BATCHING``: one context for all sequences, or one for each."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.inferer.engine.batching import MOST_SEPARATE, separate_is_faster
from services.inferer.engine.context import DECODED, Context, ContextOptions
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.separate_contexts import SeparateContexts, keeps_threads_busy
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.thread_pool import ThreadPools
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
    [[1], [1, 1], [1, 1, 1], [9, 9, 9], [30, 2], [20, 1, 1]],
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
        ([9, 9, 9], 2, False),
        ([9, 9, 9, 9], 2, True),
        ([20, 10, 10], 2, True),
        ([9, 9], 3, False),
        ([9, 9, 9, 9], 3, False),
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


def test_a_failure_beside_is_one_of_the_batch(separate: SeparateContexts) -> None:
    """Whichever thread it happens on: the last slot has no room for the token."""
    assert separate.decode([chunk(slot, 1) for slot in range(3)]) == DECODED
    for position in range(1, OPTIONS.n_ctx):
        assert separate.decode([chunk(2, 1, position)]) == DECODED
    full = [chunk(0, 1, 1), chunk(1, 1, 1), chunk(2, 1, OPTIONS.n_ctx)]
    assert separate.decode(full) != DECODED


def test_an_exception_beside_reaches_the_caller(separate: SeparateContexts) -> None:
    """And the helper works on."""
    broken = separate._contexts[1]

    def compute() -> int:
        raise MemoryError

    broken.compute = compute  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(MemoryError):
            separate.decode([chunk(slot, 1) for slot in range(3)])
    del broken.compute
    for slot in range(3):
        separate.truncate(slot, 0)
    assert separate.decode([chunk(slot, 1) for slot in range(3)]) == DECODED


def helpers() -> int:
    return sum(thread.name == "compute helper" for thread in threading.enumerate())


def test_helpers_end_with_their_contexts(model: Model, pools: ThreadPools) -> None:
    before = helpers()
    contexts = SeparateContexts(model, 2, OPTIONS, NO_ABORT, pools)
    assert helpers() == before + 1
    contexts.close()
    eventually(lambda: helpers() == before or None, "the thread ends")


@pytest.mark.parametrize("slots", [2, 4, MOST_SEPARATE])
def test_both_ways_are_measured(model: Model, pools: ThreadPools, slots: int) -> None:
    """Whichever is faster here: both can be measured, and leave nothing behind."""
    before = helpers()
    assert separate_is_faster(model, slots, OPTIONS, pools) in (True, False)
    eventually(lambda: helpers() == before or None, "the helpers end")


def test_contexts_of_their_own_that_do_not_fit(model: Model) -> None:
    engine = Engine(model, slots=1, n_ctx=4096, n_batch=32, threads=2, batching="off")
    engine._options = engine._options._replace(n_ctx=2**24)
    with pytest.raises(OutOfMemory, match="no memory for 64 contexts"):
        engine.grow(64).result(PATIENCE_S)
    assert engine.close()


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
