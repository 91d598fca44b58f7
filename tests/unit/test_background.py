"""Tasks that nobody awaits."""

import asyncio
import gc

import pytest

from shared import background
from shared.background import Tasks, drop, first_of, keep_running, start


async def test_a_failure_is_logged_with_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    """By us, and then not by asyncio, whenever it happens to be collected."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

    async def fail() -> None:
        raise ValueError("why")

    tasks = Tasks()
    tasks.start(fail(), "the first")
    task = start(fail(), "the second")
    await asyncio.wait((task,))
    assert await tasks.end(timeout_s=5) == []
    del task
    gc.collect()
    printed = capsys.readouterr().out
    assert printed.count("task_failed") == 2
    assert "the first" in printed
    assert "the second" in printed
    assert complaints == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_dropped_task_is_not_reported(when: str) -> None:
    """It may have failed already, or fail because it is cancelled."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

    async def fail() -> None:
        try:
            await asyncio.sleep(0 if when == "before" else 60)
        finally:
            raise ValueError("why")

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    if when == "before":
        await asyncio.wait((task,))
    drop(task)
    await asyncio.wait((task,))
    await asyncio.sleep(0)
    del task
    gc.collect()
    assert complaints == []


async def test_a_task_that_should_run_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it fails."""
    monkeypatch.setattr(background, "RESTART_S", 0)
    starts = 0
    lasts = asyncio.Event()

    async def work() -> None:
        nonlocal starts
        starts += 1
        if starts < 4:
            raise ValueError("why")
        lasts.set()
        await asyncio.Event().wait()

    task = keep_running(work, "work")
    await asyncio.wait_for(lasts.wait(), 60)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()


async def test_a_task_that_takes_too_long_is_cancelled_and_named() -> None:
    """The others end by themselves."""
    ended = asyncio.Event()

    async def short() -> None:
        ended.set()

    async def long() -> None:
        await asyncio.Event().wait()

    tasks = Tasks()
    tasks.start(short(), "short")
    tasks.start(long(), "long")
    await ended.wait()
    assert await tasks.end(timeout_s=0.01) == ["long"]


@pytest.mark.parametrize("which", ["future", "event", "neither"])
async def test_first_of_returns_with_the_first_and_leaves_no_task(which: str) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    event = asyncio.Event()
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(
        first_of(future, event, timeout_s=0.05 if which == "neither" else None)
    )
    await asyncio.sleep(0)
    if which == "future":
        future.set_result(None)
    elif which == "event":
        event.set()
    await waiting
    assert (future.done(), event.is_set()) == (which == "future", which == "event")
    assert not future.cancelled()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_first_of_that_is_cancelled_cancels_no_future() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(first_of(future, asyncio.Event()))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not future.done()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
