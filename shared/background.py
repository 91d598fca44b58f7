"""Tasks that nobody awaits: none of them fails in silence."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shared.logs import logger

RESTART_S = 3.0
"""Less than an inferer's entry lives without a refresh."""

CANCEL_S = 1.0
"""What a task has to end in once it is cancelled."""

T = TypeVar("T")
log = logger()


def start(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """A task whose failure is logged; its owner keeps it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


def keep_running(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
    """A task for ``work`` that should not end before it is cancelled: where it fails, that is
    logged, and it is started again."""

    async def run() -> None:
        while True:
            try:
                return await work()
            except Exception:
                log.exception("task_failed", task=name, restart_s=RESTART_S)
            await asyncio.sleep(RESTART_S)

    return asyncio.create_task(run(), name=name)


def drop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks whose outcome nobody needs any more. asyncio complains of failures that nobody
    has looked at."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(lambda task: task.cancelled() or task.exception())


class Tasks:
    """Tasks that nobody but this holds, until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = start(work, name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def end(self, patience_s: float) -> list[str]:
        """Cancel those that have not ended within ``patience_s``; their names."""
        if self._running:
            await asyncio.wait(self._running, timeout=patience_s)
        cut_off = list(self._running)
        for task in cut_off:
            task.cancel()
        if cut_off:
            await asyncio.wait(cut_off, timeout=CANCEL_S)
        return [task.get_name() for task in cut_off]


def _report(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("task_failed", task=task.get_name(), exc_info=error)
