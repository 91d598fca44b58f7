"""A cancellation is not lost, whatever it comes together with."""

import asyncio

import pytest

from shared.broker.client import cancellation_kept


async def _wait(answer: asyncio.Future[int]) -> int:
    with cancellation_kept():
        return await asyncio.wait_for(answer, 60)


async def test_a_cancellation_that_comes_with_the_answer_is_kept() -> None:
    """In the same turn of the loop, where Python 3.11's `asyncio.wait_for` returns the answer."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(_wait(answer))
    for _ in range(3):
        await asyncio.sleep(0)
    answer.set_result(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_is_done_after_a_cancellation_is_not_cut_off() -> None:
    """A task that was cancelled before may still wait, to clean up."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(await _wait(answer))

    working = asyncio.create_task(work())
    await asyncio.sleep(0)
    working.cancel()
    await asyncio.sleep(0)
    answer.set_result(1)
    with pytest.raises(asyncio.CancelledError):
        await working
    assert cleaned == [1]
