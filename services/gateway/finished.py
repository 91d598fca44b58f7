"""Announcements of results: one subscription for everybody who waits on this gateway."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from nats.aio.msg import Msg

from shared import subjects
from shared.broker import Broker
from shared.messages import Result
from shared.results import decode_stored

Announcement = asyncio.Future[Result | None]
"""Resolves to the stored result, or to None when one may have been missed: look it up then."""


class FinishedJobs:
    """Hands each result, as the broker announces what it stored, to those who expect it."""

    def __init__(self, broker: Broker, learn: Callable[[Result], None]) -> None:
        """``learn`` is called with every result, whoever waits for it."""
        self._broker = broker
        self._learn = learn
        self._expected: dict[str, set[Announcement]] = {}
        broker.on_reconnect(self._tell_to_look)

    async def start(self) -> None:
        await self._broker.nc.subscribe(subjects.FINISHED_WILDCARD, cb=self._receive)

    @contextmanager
    def expecting(self, job_id: str) -> Iterator[Announcement]:
        """The next announcement of this job. Look for the result inside the block: then wait."""
        announcement: Announcement = asyncio.get_running_loop().create_future()
        waiting = self._expected.setdefault(job_id, set())
        waiting.add(announcement)
        try:
            yield announcement
        finally:
            waiting.discard(announcement)
            if not waiting:
                self._expected.pop(job_id, None)

    async def _receive(self, message: Msg) -> None:
        job_id = subjects.last_token(message.subject)
        result = decode_stored(job_id, message.data, self._broker.now())
        _resolve(self._expected.get(job_id, ()), result)
        self._learn(result)

    def _tell_to_look(self) -> None:
        for waiting in self._expected.values():
            _resolve(waiting, None)


def _resolve(waiting: Iterable[Announcement], result: Result | None) -> None:
    for announcement in waiting:
        if not announcement.done():
            announcement.set_result(result)
