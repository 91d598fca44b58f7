"""Starts and stops a process: signals set an event, invalid settings end it with one line."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from shared.background import drop, first_of
from shared.errors import ModelError, SettingsError, TopologyError
from shared.logs import drain_logs
from shared.process.signals import SHUTDOWN_SIGNALS, unblock_signals
from shared.process.standard_descriptors import open_standard_descriptors

T = TypeVar("T")

SWITCH_INTERVAL_S = 0.0002

EXIT_CONFIGURATION = 2
"""Exit status for an error that a restart would not fix."""


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets, also one that was blocked before. The signals have no
    other effect."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SHUTDOWN_SIGNALS:
        loop.add_signal_handler(number, stopping.set)
    unblock_signals()
    try:
        yield stopping
    finally:
        for number in SHUTDOWN_SIGNALS:
            loop.remove_signal_handler(number)


class ShutdownRequested(Exception):
    """The process was asked to stop during its start."""


async def until_stopped(stopping: asyncio.Event, awaitable: Awaitable[T]) -> T:
    """Wait for ``awaitable``, until ``stopping`` is set.

    Raises:
        ShutdownRequested: ``stopping`` was set first; ``awaitable`` is cancelled.
    """
    work = asyncio.ensure_future(awaitable)
    await first_of(work, stopping)
    if work.done():
        return work.result()
    drop(work)
    await asyncio.wait((work,))
    raise ShutdownRequested


def run_process(name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run ``main`` on uvloop. Returns the exit status: 0, or 2 for invalid settings."""
    open_standard_descriptors()
    import uvloop

    # The modules stay. The garbage collector would look through them again and again, for 30 ms
    # each time, in which nothing else runs.
    gc.collect()
    gc.freeze()
    # Otherwise the event loop waits 5 ms whenever the compute thread runs Python code.
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except (SettingsError, ModelError, TopologyError) as error:
        drain_logs()
        with suppress(OSError):
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        return EXIT_CONFIGURATION
    return 0
