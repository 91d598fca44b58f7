"""Feeds: streams read with patience, that end when the gateway does."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Generic, TypeVar

KEEP_ALIVE_S = 15.0
"""After so long a silence a stream says that it is alive: proxies close those that do not."""

T = TypeVar("T")

_closing: set[asyncio.Task[Any]] = set()


class Feed(Generic[T]):
    """Reads ``stream``; a read that is cancelled or too slow loses nothing."""

    def __init__(self, stream: AsyncGenerator[T, None], stopping: asyncio.Event) -> None:
        self._stream = stream
        self._stopped = asyncio.create_task(stopping.wait())
        self._arriving: asyncio.Task[T] | None = None

    async def next(self, patience_s: float | None = None) -> T:
        """The next item.

        Raises:
            TimeoutError: not within ``patience_s``; call again.
            StopAsyncIteration: the stream has ended.
            GatewayStopping: this gateway stops; the stream goes on elsewhere.
        """
        if self._arriving is None:
            self._arriving = asyncio.create_task(_next(self._stream))
        waiting = (self._arriving, self._stopped)
        await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if self._arriving.done():
            arrived, self._arriving = self._arriving, None
            try:
                return arrived.result()
            except _Ended:
                raise StopAsyncIteration from None
        if self._stopped.done():
            raise GatewayStopping
        raise TimeoutError

    async def items(self) -> AsyncIterator[T | None]:
        """All items; None after each silence of 15 s.

        Raises:
            GatewayStopping: see `next`.
        """
        while True:
            try:
                yield await self.next(KEEP_ALIVE_S)
            except TimeoutError:
                yield None
            except StopAsyncIteration:
                return

    def close(self) -> None:
        """Let go of the stream; it ends in the background."""
        self._stopped.cancel()
        if self._arriving is not None:
            self._arriving.cancel()
            return
        task = asyncio.create_task(_close(self._stream))
        _closing.add(task)
        task.add_done_callback(_closing.discard)


class GatewayStopping(Exception):
    """This gateway shuts down; the job goes on without it."""


class _Ended(Exception):
    """`StopAsyncIteration`, which a task cannot carry."""


async def _next(stream: AsyncGenerator[T, None]) -> T:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        raise _Ended from None


async def _close(stream: AsyncGenerator[Any, None]) -> None:
    await stream.aclose()
