"""How a run of the engine ends, handed over from its threads to the event loop."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from services.inferer.engine.sequence import Aborted
from services.inferer.worker.delivery import Interrupted, Job
from shared.background import first_of
from shared.logs import logger

T = TypeVar("T")
log = logger()


class EngineOutcome(Generic[T]):
    """What the engine passes to ``on_end``."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[T | Exception] = self._loop.create_future()

    def set(self, outcome: T | Exception) -> None:
        """From any thread; also when the loop runs no more. The first one counts."""

        def resolve() -> None:
            if not self._ended.done():
                self._ended.set_result(outcome)

        try:
            self._loop.call_soon_threadsafe(resolve)
        except RuntimeError:
            log.warning("outcome_came_after_the_loop_ended")

    async def wait(self, job: Job, abort: Callable[[], None]) -> None:
        """Wait until it is set. ``abort`` is called, and has it set, if the job is interrupted
        before or runs out of time."""
        try:
            await first_of(self._ended, job.interrupting, timeout_s=job.seconds_left)
            if not (self._ended.done() or job.interrupting.done()):
                job.interrupt("timed_out")
        finally:
            if not self._ended.done():
                abort()
        if not self._ended.done():
            await asyncio.wait((self._ended,))

    @property
    def value(self) -> T:
        """Once it is set.

        Raises:
            Interrupted: the run was aborted.
            SluiceError: it failed.
        """
        outcome = self._ended.result()
        if isinstance(outcome, Aborted):
            raise Interrupted
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
