"""Ends the process when llama.cpp hangs: no thread can be stopped from outside, a process can."""

import asyncio
import faulthandler
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.inferer.engine.engine import Engine
from shared.background import keep_running
from shared.logs import drain_logs, logger
from shared.process.exit_status import EXIT_STALLED

LOOKS = 4
LONGEST_PAUSE_S = 1.0

log = logger()


@asynccontextmanager
async def watched(engine: Engine, stall_s: float) -> AsyncIterator[None]:
    """During the block, end the process once the engine `stalled`.

    Its jobs come back when their leases end, and the start of each counts as an attempt.
    """
    watching = keep_running(lambda: _watch(engine, stall_s), "watchdog")
    try:
        yield
    finally:
        watching.cancel()


async def stalled(engine: Engine, stall_s: float) -> None:
    """Return when the engine has had work for ``stall_s`` seconds and has not got on with it."""
    pause_s = min(stall_s / LOOKS, LONGEST_PAUSE_S)
    seen: dict[object, int] = {}
    silent_s: dict[object, float] = {}
    while max(silent_s.values(), default=0.0) < stall_s:
        await asyncio.sleep(pause_s)
        now = engine.in_progress
        # Counted in pauses, not read from a clock: when this process is stopped for a while
        # (SIGSTOP, a laptop that sleeps) the engine is, too.
        silent_s = {
            work: silent_s.get(work, 0.0) + pause_s
            for work, step in now.items()
            if seen.get(work) == step
        }
        seen = now


async def _watch(engine: Engine, stall_s: float) -> None:
    await stalled(engine, stall_s)
    log.error("compute_stalled", stall_s=stall_s)
    drain_logs()
    faulthandler.dump_traceback()
    os._exit(EXIT_STALLED)
