"""Background tasks: failures of tasks that are not awaited are logged."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from shared.logs import logger

RESTART_S = 3.0
"""Less than the TTL of an inferer's entry, so that a restarted heartbeat is in time."""

CANCEL_S = 1.0
"""How long a cancelled task may take to end."""

T = TypeVar("T")
log = logger()


def start(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Start a task whose failure is logged. The caller must keep a reference to it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


def keep_running(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
    """Start a task for ``work`` that should run until it is cancelled. If it fails, the failure is
    logged and ``work`` is started again."""

    async def run() -> None:
        while True:
            try:
                return await work()
            except Exception:
                log.exception("task_failed", task=name, restart_s=RESTART_S)
            await asyncio.sleep(RESTART_S)

    return asyncio.create_task(run(), name=name)


def drop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks whose outcome is not needed, and mark their exceptions as retrieved: asyncio
    would otherwise log them."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(lambda task: task.cancelled() or task.exception())


async def first_of(
    *waited_for: asyncio.Future[Any] | asyncio.Event, timeout_s: float | None = None
) -> None:
    """Return when one of the futures is done or one of the events is set, or after ``timeout_s``.
    No future is cancelled."""
    events = [
        asyncio.create_task(one.wait(), name="wait for an event")
        for one in waited_for
        if isinstance(one, asyncio.Event)
    ]
    futures = [one for one in waited_for if isinstance(one, asyncio.Future)]
    try:
        await asyncio.wait(
            [*futures, *events], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        drop(*events)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all ``streams`` as they arrive, each with the index of its stream. If a stream
    fails, its error is raised. All streams are closed at the end."""
    ended = object()
    items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                items.put_nowait((number, item))
        finally:
            await stream.aclose()
            items.put_nowait((number, ended))

    reading = [
        asyncio.create_task(read(number, stream), name="read one of several streams")
        for number, stream in enumerate(streams)
    ]
    try:
        left = len(reading)
        while left:
            number, item = await items.get()
            if item is not ended:
                yield number, item
                continue
            await reading[number]
            left -= 1
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


class Tasks:
    """Owns tasks until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = start(work, name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def end(self, timeout_s: float) -> list[str]:
        """Wait ``timeout_s`` for all tasks, and cancel the rest. Returns the names of those."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout_s)
        cut_off = list(self._running)
        for task in cut_off:
            task.cancel()
        if cut_off:
            await asyncio.wait(cut_off, timeout=CANCEL_S)
        return [task.get_name() for task in cut_off]


def _report(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("task_failed", task=task.get_name(), exc_info=error)
