"""Streams that are read in the background."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from services.gateway.http.sse import BufferedStream, GatewayStopping


async def numbers(count: int, go_on: asyncio.Event) -> AsyncGenerator[int, None]:
    """The last one comes once ``go_on`` is set."""
    for number in range(count):
        if number == count - 1:
            await go_on.wait()
        yield number


async def test_what_is_peeked_stays_to_be_read() -> None:
    """Also if the peek is cancelled, or the gateway stops before anything is read."""
    go_on, stopping = asyncio.Event(), asyncio.Event()
    stream = BufferedStream(numbers(4, go_on), stopping)
    assert await stream.peek(lambda number: number == 1) == 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await stream.peek(lambda number: number == 3)
    assert await stream.next() == 0
    go_on.set()
    assert await stream.peek(lambda number: number == 3) == 3
    stopping.set()
    assert [await stream.next() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(GatewayStopping):
        await stream.next()
    stream.close()
