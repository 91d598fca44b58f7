"""Which jobs may run now: any number together, or one alone."""

import asyncio
from collections import deque
from contextlib import suppress


class Turns:
    """Turns are granted in the order of the requests.

    A job that must run alone waits until the running jobs have ended, and later requests wait
    until it has ended: neither can starve.
    """

    def __init__(self) -> None:
        self._running = 0
        self._alone = False
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    async def take(self, *, alone: bool) -> None:
        """Wait for a turn and have it until `leave`; a cancelled call gets none."""
        if self.take_now(alone=alone):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((alone, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove((alone, turn))
                self._admit()
            else:
                self.leave()  # the turn came at the same moment
            raise

    def take_now(self, *, alone: bool) -> bool:
        """Have a turn until `leave`, if none needs to be waited for. Returns whether it is so."""
        is_free = not self._waiting and self._admits(alone)
        if is_free:
            self._enter(alone)
        return is_free

    def leave(self) -> None:
        self._running -= 1
        self._alone = False
        self._admit()

    def _admits(self, alone: bool) -> bool:
        return not self._alone and not (alone and self._running)

    def _enter(self, alone: bool) -> None:
        self._running += 1
        self._alone = alone

    def _admit(self) -> None:
        while self._waiting and self._admits(self._waiting[0][0]):
            alone, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._enter(alone)
                turn.set_result(None)
