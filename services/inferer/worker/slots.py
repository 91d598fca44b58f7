"""The slots of one inferer: one job at a time is pulled while a slot is free, and done in it."""

import asyncio
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg

from services.inferer.worker.pull import Puller

WITHDRAWAL_S = 2.0
"""How long to wait until a pull is withdrawn."""


class Slots:
    """As many as were last asked for; opened and closed while jobs run."""

    def __init__(self, process: Callable[[Msg], Awaitable[None]]) -> None:
        """``process`` does everything that is to be done with a job."""
        self._process = process
        self.count = 0
        """The slots that are open. To be changed by `set`."""
        self.busy = 0
        """Jobs under way: more than ``count`` while some end whose slot was closed."""
        self._pulling: asyncio.Task[Msg] | None = None
        self._changed = asyncio.Event()
        self._does_not_pull = asyncio.Event()
        self._does_not_pull.set()
        self._is_ending = False
        self._jobs: asyncio.TaskGroup | None = None
        """Of `serve`, while that runs."""

    def set(self, count: int) -> None:
        """Open or close slots until there are ``count``; a running job ends in its slot."""
        self.count = count
        self._changed.set()
        if self._pulling is not None and self.busy >= count:
            self._pulling.cancel()

    def take(self, message: Msg, busy: int) -> bool:
        """Run a job that another inferer has pulled, which has ``busy`` other jobs, if a slot is
        free here and this inferer has at most as many. Returns whether it was taken."""
        if self._jobs is None or self.busy >= self.count or self.busy > busy:
            return False
        self._start(message)
        if self._pulling is not None and self.busy >= self.count:
            self._pulling.cancel()
        return True

    async def settled(self) -> None:
        """Return once no job is pulled for a slot that was closed."""
        if self.busy >= self.count:
            async with asyncio.timeout(WITHDRAWAL_S):
                await self._does_not_pull.wait()

    def end(self) -> None:
        """Close all slots; `serve` returns when no job is pulled any more."""
        self._is_ending = True
        self.set(0)

    async def serve(self, jobs: asyncio.TaskGroup, puller: Puller) -> None:
        """Pull jobs, each done in a task of ``jobs``, until the end."""
        self._jobs = jobs
        async with puller:
            while not self._is_ending:
                if self.busy < self.count:
                    self._does_not_pull.clear()
                    if (message := await self._pull(puller)) is None:
                        continue
                    if self.busy < self.count:
                        self._start(message)
                    else:  # an offered job took the slot while this one was being pulled
                        puller.give_back(message)
                else:
                    self._does_not_pull.set()
                    self._changed.clear()
                    await self._changed.wait()

    async def _pull(self, puller: Puller) -> Msg | None:
        """The next job; None if the slot for it is closed before it comes."""
        self._pulling = asyncio.create_task(puller.next(), name="pull a job")
        try:
            await asyncio.wait((self._pulling,))
            if not self._pulling.cancelled():
                return self._pulling.result()
        finally:
            self._pulling.cancel()
            self._pulling = None
        await puller.requeue()
        return None

    def _start(self, message: Msg) -> None:
        assert self._jobs is not None
        self.busy += 1
        self._jobs.create_task(self._do(message), name="do a job")

    async def _do(self, message: Msg) -> None:
        try:
            await self._process(message)
        finally:
            self.busy -= 1
            self._changed.set()
