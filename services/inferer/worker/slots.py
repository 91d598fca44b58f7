"""The slots of one inferer: each pulls a job, has it done, and only then pulls the next."""

import asyncio
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg

from services.inferer.worker.pull import Puller
from shared.background import drop, first_of


class Slots:
    """As many as were last asked for; opened and closed while jobs run."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        puller: Callable[[], Puller],
        process: Callable[[Msg], Awaitable[None]],
    ) -> None:
        """Every slot is a task in ``group`` with a ``puller`` of its own."""
        self._group = group
        self._puller = puller
        self._process = process
        self._open: list[_Slot] = []
        self._closing: list[_Slot] = []

    @property
    def count(self) -> int:
        return len(self._open)

    def set(self, count: int) -> list[asyncio.Task[None]]:
        """Open or close slots until there are ``count``; a running job ends in its slot.

        Idle ones are closed first, and busy ones that are closing opened first: no more jobs run
        at once than there are slots, but for those that ran before. Returns the tasks of the idle
        ones that close: once these are done none of them pulls.
        """
        while len(self._open) < count and (busy := [s for s in self._closing if s.busy]):
            self._closing.remove(busy[0])
            busy[0].closing.clear()
            self._open.append(busy[0])
        while len(self._open) < count:
            slot = _Slot()
            slot.task = self._group.create_task(self._serve(slot), name="slot")
            self._open.append(slot)
        surplus = sorted(self._open, key=lambda slot: slot.busy)[: len(self._open) - count]
        for slot in surplus:
            self._open.remove(slot)
            self._closing.append(slot)
            slot.closing.set()
        return [slot.task for slot in surplus if slot.task is not None and not slot.busy]

    async def _serve(self, slot: "_Slot") -> None:
        async with self._puller() as puller:
            while not slot.closing.is_set():
                pulled = asyncio.create_task(puller.next(), name="pull a job")
                await first_of(pulled, slot.closing)
                if pulled.done():
                    slot.busy = True
                    await self._process(pulled.result())
                    slot.busy = False
                else:
                    drop(pulled)
                    await asyncio.wait((pulled,))
        self._closing.remove(slot)


class _Slot:
    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self.busy = False
        self.task: asyncio.Task[None] | None = None
