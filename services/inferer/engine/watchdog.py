"""Ends the process when llama.cpp hangs: a thread cannot be stopped from outside, a process can."""

import asyncio
import faulthandler
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.inferer.engine.set_up import AnyEngine
from shared.background import keep_running
from shared.logs import drain_logs, logger
from shared.process.exit_status import EXIT_STALLED

POLLS = 4
"""At least this many in ``stall_s`` seconds."""
MAX_POLL_S = 5.0

log = logger()


@asynccontextmanager
async def watched(engine: AnyEngine, stall_s: float) -> AsyncIterator[None]:
    """During the block, end the process once the engine has `stalled`.

    Its jobs are redelivered when their leases expire, and the start of each counts as an attempt.
    """
    watching = keep_running(lambda: _watch(engine, stall_s), "watchdog")
    try:
        yield
    finally:
        watching.cancel()


async def stalled(engine: AnyEngine, stall_s: float) -> None:
    """Return when the engine has had work for ``stall_s`` seconds without progress."""
    poll_s = min(stall_s / POLLS, MAX_POLL_S)
    last: dict[object, int] = {}
    stalled_s: dict[object, float] = {}
    while max(stalled_s.values(), default=0.0) < stall_s:
        await asyncio.sleep(poll_s)
        counters = engine.in_progress
        # Counted in polls, not read from a clock: while this process is stopped (SIGSTOP, a laptop
        # that sleeps) the engine is, too.
        stalled_s = {
            thread: stalled_s.get(thread, 0.0) + poll_s
            for thread, counter in counters.items()
            if last.get(thread) == counter
        }
        last = counters


async def _watch(engine: AnyEngine, stall_s: float) -> None:
    await stalled(engine, stall_s)
    log.error("compute_stalled", stall_s=stall_s)
    drain_logs()
    faulthandler.dump_traceback()
    os._exit(EXIT_STALLED)
