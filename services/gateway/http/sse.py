"""Feeds: streams read with patience, that end when the gateway does."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Generic, TypeVar

from litestar import Request

from services.gateway.http.request_end import at_request_end
from shared.background import start
from shared.errors import TooManyStreams

KEEP_ALIVE_S = 15.0
"""After so long a silence a stream says that it is alive: proxies close those that do not."""

T = TypeVar("T")

_pumping: set[asyncio.Task[Any]] = set()


class GatewayStopping(Exception):
    """This gateway shuts down; the job goes on without it."""


class Streams:
    """The streams that are open on a gateway, no more than ``bound``: each costs memory here and a
    consumer in the broker."""

    def __init__(self, bound: int, stopping: asyncio.Event) -> None:
        self._bound = bound
        self._stopping = stopping
        self._open = 0

    def require_room(self) -> None:
        """Raises: TooManyStreams: as many are open as may be."""
        if self._open >= self._bound:
            raise TooManyStreams(
                f"this gateway has {self._open} streams open, which is its limit; try again later"
            )

    def open(self, stream: AsyncGenerator[T, None], request: Request[Any, Any, Any]) -> "Feed[T]":
        """A feed of ``stream``, which is closed when ``request`` has ended.

        Raises:
            TooManyStreams.
        """
        self.require_room()
        self._open += 1
        feed = Feed(stream, self._stopping)

        def close() -> None:
            self._open -= 1
            feed.close()

        at_request_end(request, close)
        return feed


class Feed(Generic[T]):
    """Reads ``stream`` in the background; a read that is cancelled or too slow loses nothing."""

    def __init__(self, stream: AsyncGenerator[T, None], stopping: asyncio.Event) -> None:
        """It has to be closed."""
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._pump = start(self._fill(stream), "read a stream")
        _pumping.add(self._pump)  # until it has closed the stream, whoever still reads
        self._pump.add_done_callback(_pumping.discard)
        self._stopping = stopping
        self._stopped = asyncio.create_task(self._stop())

    async def next(self, patience_s: float | None = None) -> T:
        """The next item.

        Raises:
            TimeoutError: not within ``patience_s``; call again.
            StopAsyncIteration: the stream has ended.
            GatewayStopping: this gateway stops; the stream goes on elsewhere.
        """
        if self._stopping.is_set():
            raise GatewayStopping
        async with asyncio.timeout(patience_s):
            item = await self._items.get()
        if isinstance(item, _End):
            raise item.error
        return item

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
        self._pump.cancel()

    async def _fill(self, stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                self._items.put_nowait(item)
        except Exception as error:
            self._items.put_nowait(_End(error))
        else:
            self._items.put_nowait(_End(StopAsyncIteration()))
        finally:
            await stream.aclose()

    async def _stop(self) -> None:
        await self._stopping.wait()
        self._items.put_nowait(_End(GatewayStopping()))


class _End:
    """Why there are no more items."""

    def __init__(self, error: Exception) -> None:
        self.error = error
