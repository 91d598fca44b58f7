"""Tasks that nobody awaits."""

import asyncio
import gc

import pytest

from shared import background
from shared.background import Tasks, drop, keep_running, start


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
    told = capsys.readouterr().out
    assert told.count("task_failed") == 2
    assert "the first" in told
    assert "the second" in told
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
