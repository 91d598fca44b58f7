"""When the watchdog takes the compute thread to hang, on the real engine."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.watchdog import stalled
from shared.wire.requests import Sampling

STALL_S = 1.0
PATIENCE_S = 60.0

Prompt = Callable[[], tuple[list[int], list[Sampler]]]


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[Engine]:
    """Eight tokens of a prompt at a time, so that a long one takes many steps."""
    model = Model(tiny_model, 0)
    engine = Engine(model, slots=1, n_ctx=8192, n_batch=8, threads=1)
    yield engine
    assert engine.close()
    model.close()


def submit(engine: Engine, prepare: Prompt, max_tokens: int) -> asyncio.Event:
    """Put a sequence into the engine; set once it has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end(_: Generation | Exception) -> None:
        loop.call_soon_threadsafe(ended.set)

    engine.submit(GenerationSequence(prepare, max_tokens, [], lambda _: None, end))
    return ended


def prompt_of(engine: Engine, length: int) -> Prompt:
    tokens = (engine.model.tokenize("word " * length))[:length]
    return lambda: (tokens, [Sampler(engine.model, Sampling(seed=1), 1, tokens)])


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(2000, 1), (4, 400)])
async def test_work_that_goes_on_is_not_a_stall(
    engine: Engine, prompt_tokens: int, max_tokens: int
) -> None:
    """Neither a long prompt nor a long answer, for several times as long as a stall."""
    watching = asyncio.create_task(stalled(engine, STALL_S))
    until = time.monotonic() + 3 * STALL_S
    while time.monotonic() < until:
        ended = submit(engine, prompt_of(engine, prompt_tokens), max_tokens)
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
    assert not watching.done()
    watching.cancel()


async def test_idleness_is_not_a_stall(engine: Engine) -> None:
    """An engine without work has nothing to show."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stalled(engine, STALL_S / 4), STALL_S)


async def test_a_growth_that_hangs_is_a_stall(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no job runs, too."""
    hanging = threading.Event()
    move = engine._move_to_context

    def hang(slots: int) -> None:
        hanging.wait(PATIENCE_S)
        move(slots)

    monkeypatch.setattr(engine, "_move_to_context", hang)
    grown = engine.grow(2)
    await asyncio.wait_for(stalled(engine, STALL_S), PATIENCE_S)
    hanging.set()
    await asyncio.wait_for(asyncio.wrap_future(grown), PATIENCE_S)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stalled(engine, STALL_S / 4), STALL_S)


async def test_a_thread_that_does_not_come_back_is_a_stall(engine: Engine) -> None:
    """Whatever it hangs in, here in what comes before a prompt."""
    hanging = threading.Event()

    def hang() -> tuple[list[int], list[Sampler]]:
        hanging.wait(PATIENCE_S)
        return prompt_of(engine, 4)()

    ended = submit(engine, hang, 1)
    await asyncio.wait_for(stalled(engine, STALL_S), PATIENCE_S)
    hanging.set()
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
