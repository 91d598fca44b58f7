"""Starting and stopping a process: signals become an event, wrong settings one line."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from shared.background import drop
from shared.errors import ModelError, SettingsError, TopologyError
from shared.logs import drain_logs
from shared.process.signals import STOPPING, release_signals
from shared.process.standard_descriptors import open_standard_descriptors

T = TypeVar("T")

SWITCH_INTERVAL_S = 0.0002

EXIT_CONFIGURATION = 2
"""Exit status of a process that would fail the same way if it were started again."""


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets, one that was held back as well; nothing else happens
    on them."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        loop.add_signal_handler(number, stopping.set)
    release_signals()
    try:
        yield stopping
    finally:
        for number in STOPPING:
            loop.remove_signal_handler(number)


class Stopped(Exception):
    """The process was asked to stop while it was still starting."""


async def unless_stopped(stopping: asyncio.Event, awaitable: Awaitable[T]) -> T:
    """Wait for ``awaitable``, but not beyond a request to stop.

    Raises:
        Stopped: ``stopping`` was set first; ``awaitable`` is cancelled.
    """
    work, stop = asyncio.ensure_future(awaitable), asyncio.create_task(stopping.wait())
    await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if work.done():
        return work.result()
    drop(work)
    await asyncio.wait((work,))
    raise Stopped


def run_process(name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run ``main`` on uvloop to its end; exit status 0, or 2 when it could not start as asked."""
    open_standard_descriptors()
    import uvloop

    # The event loop is not to wait 5 ms whenever the compute thread runs a line of Python.
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
