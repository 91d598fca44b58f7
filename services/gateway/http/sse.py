"""Streams of events for HTTP clients: buffered, limited in number, ended by a shutdown."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

from litestar import Request
from litestar.response import ServerSentEventMessage, Stream

from services.gateway.http.document import EVENT_STREAM
from services.gateway.http.request_end import on_request_end
from shared.background import start
from shared.errors import TooManyStreams

KEEP_ALIVE_S = 15.0
"""A silent stream sends a comment this often, because proxies close silent connections."""

COMMENT = ServerSentEventMessage(comment="", data=None)
"""Clients drop it. With its default, empty data, it would be an event, which OpenAI's client cannot
read."""

T = TypeVar("T")

_readers: set[asyncio.Task[Any]] = set()


HEADERS = {"cache-control": "no-cache", "connection": "keep-alive", "x-accel-buffering": "no"}
"""Neither a cache nor a proxy may hold events back."""


def event_stream(messages: AsyncIterator[ServerSentEventMessage]) -> Stream:
    """A response of server-sent events. Litestar's `ServerSentEvent` runs a call in a worker thread
    before the first event; this does not."""

    async def encoded() -> AsyncIterator[bytes]:
        async for message in messages:
            yield message.encode()

    return Stream(encoded(), media_type=EVENT_STREAM, headers=HEADERS)


class GatewayStopping(Exception):
    """This gateway shuts down; the job continues."""


class OpenStreams:
    """The open streams of a gateway, ``limit`` at most: each takes memory here, and a subscription
    or a consumer in the broker."""

    def __init__(self, limit: int, stopping: asyncio.Event) -> None:
        self._limit = limit
        self._stopping = stopping
        self._open = 0

    def admit(self, request: Request[Any, Any, Any]) -> None:
        """Count a stream until ``request`` has ended. Call this before anything is done for it.

        Raises:
            TooManyStreams: the limit is reached.
        """
        if self._open >= self._limit:
            raise TooManyStreams(
                f"this gateway has {self._open} streams open, which is its limit; try again later"
            )
        self._open += 1

        def leave() -> None:
            self._open -= 1

        on_request_end(request, leave)

    def read(
        self, stream: AsyncGenerator[T, None], request: Request[Any, Any, Any]
    ) -> "BufferedStream[T]":
        """Read ``stream`` in the background until ``request``, which was admitted, has ended."""
        buffered = BufferedStream(stream, self._stopping)
        on_request_end(request, buffered.close)
        return buffered


class BufferedStream(Generic[T]):
    """Reads ``stream`` in the background, so that a cancelled `next` loses no item."""

    def __init__(self, stream: AsyncGenerator[T, None], stopping: asyncio.Event) -> None:
        """Call `close` when done."""
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._peeked: deque[T] = deque()
        self._reader = start(self._fill(stream), "read a stream")
        _readers.add(self._reader)  # until it has closed the stream
        self._reader.add_done_callback(_readers.discard)
        self._stopping = stopping
        self._stop_watch = asyncio.create_task(self._stop())

    async def next(self, timeout_s: float | None = None) -> T:
        """The next item.

        Raises:
            TimeoutError: there was none within ``timeout_s``; call again.
            StopAsyncIteration: the stream has ended.
            GatewayStopping: this gateway shuts down; the client can resume at another one.
        """
        if self._peeked:
            return self._peeked.popleft()
        if self._stopping.is_set():
            raise GatewayStopping
        async with asyncio.timeout(timeout_s):
            item = await self._items.get()
        if isinstance(item, _End):
            raise item.error
        return item

    async def peek(self, is_wanted: Callable[[T], bool]) -> T:
        """The first item that ``is_wanted``. It stays to be read, and so do those before it, also
        if this is cancelled.

        Raises:
            StopAsyncIteration, GatewayStopping: see `next`.
        """
        passed: deque[T] = deque()
        try:
            while True:
                passed.append(await self.next())
                if is_wanted(passed[-1]):
                    return passed[-1]
        finally:
            self._peeked = passed + self._peeked

    async def items(self, silence_s: float = KEEP_ALIVE_S) -> AsyncIterator[T | None]:
        """All items, and None after every ``silence_s`` without one.

        Raises:
            GatewayStopping: see `next`.
        """
        while True:
            try:
                yield await self.next(silence_s)
            except TimeoutError:
                yield None
            except StopAsyncIteration:
                return

    def close(self) -> None:
        """Stop reading; the stream is closed in the background."""
        self._stop_watch.cancel()
        self._reader.cancel()

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
    """The last entry of the queue: why there are no more items."""

    def __init__(self, error: Exception) -> None:
        self.error = error
