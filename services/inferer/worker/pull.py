"""Pulling one message at a time, with pull requests of our own.

The client's `fetch` cannot name a priority group, hides the broker's status messages, and leaves
a live pull behind when it is cancelled, which swallows the next job until its lease ends.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Final, Self

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.background import Tasks
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.refusals import TRANSIENT
from shared.logs import logger
from shared.timestamps import NANOSECONDS
from shared.wire import subjects

EXPIRES_S = 5
"""Short: a job that is delivered to a pull behind a hung node is lost for a whole lease."""
LOST_AFTER_S = EXPIRES_S + 1
"""The broker has not said that a pull has expired: it is lost."""

ANSWER_S = 0.25
"""If a priority has jobs but has reached its limit, the broker does not answer: the pull waits,
although it asks not to. So the next priority is tried after this time; a late answer counts."""

EMPTY_S = 0.05
"""A priority that was empty is not pulled again for so long: between jobs of milliseconds, a
useless pull takes much of the time."""

ECHO_S = 2.0
"""How long a slot that closes waits for what was on its way when its pulls were withdrawn."""

FAIR_S = 60.0
"""A priority that has not been pulled for this long is pulled first: none can starve."""

ACK_PREFIX = "$JS.ACK."
NONE_THERE, EXPIRED = "404", "408"
DELIVERED: Final = "delivered"
RECONNECTED: Final = "reconnected"
LOST: Final = "lost"
AT_ONCE = (NONE_THERE, EXPIRED, DELIVERED, RECONNECTED, LOST)
"""Endings of a pull after which the next may follow at once; after a refusal it may not."""

Kind = tuple[str, int | bool]
ASK: Kind = ("no_wait", True)
WAIT: Kind = ("expires", EXPIRES_S * NANOSECONDS)
"""A pull that is answered at once, and one that waits for a job."""

log = logger()


class Puller:
    """One inferer's pulls, for one message at a time.

    The priorities are pulled one after another, the highest first, without those that were empty a
    moment ago; when all of them are empty, a pull waits at each and is made again when it expires.
    The first message ends the others. All pulls are answered over one subscription. If some were
    not, it gets another subject: the broker drops a pull whose reply subject nobody subscribes to.
    A job that comes for an earlier pull is taken if one is being pulled, else it is requeued.
    """

    def __init__(
        self,
        broker: Broker,
        model: str,
        priority: Callable[[], int] = lambda: 0,
        fair_s: float = FAIR_S,
    ) -> None:
        """``priority`` is that of the next pull: lower ones are served first."""
        self._broker = broker
        self._consumers = {each: subjects.consumer(model, each) for each in subjects.PRIORITIES}
        self._fair_s = fair_s
        self._priority = priority
        self._pulled_at = dict.fromkeys(subjects.PRIORITIES, time.monotonic())
        self._empty_until = dict.fromkeys(subjects.PRIORITIES, 0.0)
        self._inbox = broker.nc.new_inbox()
        self._numbers = itertools.count()
        self._answers: Subscription | None = None
        self._watchdogs: dict[str, asyncio.TimerHandle] = {}
        """One for each pull under way, by the subject that its status comes to."""
        self._is_left_behind = False
        """Whether the broker may still have a pull that is no longer watched."""
        self._is_pulling = False
        self._job: Msg | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._requeuing = Tasks()
        self._forget = broker.on_reconnect(self._reconnected)

    async def __aenter__(self) -> Self:
        self._answers = await self._broker.nc.subscribe_directly(self._subject, self._receive)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._answers is not None
        if self._broker.is_connected:
            with suppress(*TRANSIENT):
                await self._broker.nc.end_at_broker(self._answers)
                # What the broker had sent before arrives before this ends.
                await self._broker.nc.flush(ECHO_S)
        with suppress(*TRANSIENT, nats.errors.BadSubscriptionError):
            # Also where the broker is away: a reconnect would subscribe to it again.
            await self._answers.unsubscribe()
        self._forget()
        await self.requeue()
        await self._requeuing.end(ECHO_S)

    async def next(self) -> Msg:
        """The next job's message, however long it takes; through outages of the broker too."""
        while self._job is None:
            await self._pull_next()
        # Also one that came after an earlier call had been cancelled.
        job, self._job = self._job, None
        return job

    async def requeue(self) -> None:
        """Requeue a job that came although the call of `next` was cancelled."""
        if self._job is not None:
            job, self._job = self._job, None
            with suppress(*TRANSIENT):  # else its lease runs out
                await job.nak()

    def give_back(self, message: Msg) -> None:
        """Requeue a job that `next` returned, without waiting for it."""
        self._requeuing.start(message.nak(), "requeue a job")

    async def _pull_next(self) -> None:
        """Pull the priorities in their order, then wait at all of them until something happens."""
        if not self._broker.is_connected:
            # The client would buffer a pull and send it when the broker is back.
            await asyncio.sleep(RETRY_DELAY_S)
            return
        self._is_pulling = True
        try:
            for priority in self._in_order():
                how = await self._pull([priority], ASK, ANSWER_S)
                if how == NONE_THERE:
                    self._empty_until[priority] = time.monotonic() + EMPTY_S
                if how not in AT_ONCE:
                    await asyncio.sleep(RETRY_DELAY_S)
                if self._job is not None:
                    return
            await self._withdraw()  # one that was not answered, at its limit
            how = await self._wait_at_all()
            self._empty_until = dict.fromkeys(subjects.PRIORITIES, 0.0)
        finally:
            self._is_pulling = False
            await self._withdraw()
        if how not in AT_ONCE:
            await asyncio.sleep(RETRY_DELAY_S)

    async def _wait_at_all(self) -> str:
        """Have a pull wait at each priority until a job comes or one of them fails. Returns how it
        ended."""
        how = EXPIRED
        while how in (EXPIRED, NONE_THERE) and self._job is None:
            waiting = {reply.rpartition(".")[2] for reply in self._watchdogs}
            expired = [each for each in subjects.PRIORITIES if each not in waiting]
            how = await self._pull(expired, WAIT, LOST_AFTER_S)
        return how

    def _in_order(self) -> list[str]:
        """The priorities to pull before waiting: the highest first, but before all others one that
        is overdue.

        The lowest need not be pulled: a waiting pull does the same.
        """
        now = time.monotonic()
        highest_first = [
            priority for priority in subjects.PRIORITIES[:-1] if self._empty_until[priority] <= now
        ]
        longest_ago = min(self._pulled_at, key=self._pulled_at.__getitem__)
        if now - self._pulled_at[longest_ago] < self._fair_s:
            return highest_first
        return [longest_ago, *(other for other in highest_first if other != longest_ago)]

    async def _pull(self, priorities: list[str], kind: Kind, lost_after_s: float) -> str:
        """Pull each of ``priorities`` and wait until any pull under way has ended. Returns how."""
        loop = asyncio.get_running_loop()
        request = _request(self._priority(), kind)
        self._ended = loop.create_future()
        try:
            for priority in priorities:
                self._pulled_at[priority] = time.monotonic()
                reply = f"{self._inbox}.{next(self._numbers)}.{priority}"
                self._watchdogs[reply] = loop.call_later(lost_after_s, self._lose, reply)
                await self._broker.nc.publish(
                    f"$JS.API.CONSUMER.MSG.NEXT.{subjects.REQUESTS}.{self._consumers[priority]}",
                    request,
                    reply=reply,
                )
            return await self._ended
        except TRANSIENT as error:
            return type(error).__name__

    @property
    def _subject(self) -> str:
        return f"{self._inbox}.*.*"

    async def _withdraw(self) -> None:
        """Withdraw the pulls that were not answered, if there are any. Does not wait, so it is done
        also where a cancellation is under way."""
        if not (self._watchdogs or self._is_left_behind):
            return
        self._unwatch()
        self._is_left_behind = False
        self._inbox = self._broker.nc.new_inbox()
        assert self._answers is not None
        await self._broker.nc.move(self._answers, self._subject)

    def _unwatch(self) -> None:
        for watchdog in self._watchdogs.values():
            watchdog.cancel()
        self._watchdogs.clear()

    def _end(self, how: str) -> None:
        if not self._ended.done():
            self._ended.set_result(how)

    def _lose(self, reply: str) -> None:
        del self._watchdogs[reply]
        self._is_left_behind = True
        self._end(LOST)

    def _reconnected(self) -> None:
        """What was on its way is lost with the connection."""
        self._is_left_behind |= bool(self._watchdogs)
        self._unwatch()
        self._end(RECONNECTED)

    def _receive(self, message: Msg) -> None:
        if not message.reply.startswith(ACK_PREFIX):
            # A status; a job has its acknowledgement as reply, whatever its headers say.
            watchdog = self._watchdogs.pop(message.subject, None)
            if watchdog is not None:  # else of a pull that was ended
                watchdog.cancel()
                self._end((message.headers or {}).get("Status", ""))
        elif self._is_pulling and self._job is None:
            self._job = message
            self._is_left_behind |= len(self._watchdogs) > 1
            self._unwatch()
            self._end(DELIVERED)
        else:
            # Never two at a time: this one came for a pull that was ended.
            self.give_back(message)


@lru_cache
def _request(priority: int, kind: Kind) -> bytes:
    return msgspec.json.encode(
        {"batch": 1, "group": subjects.PRIORITY_GROUP, "priority": priority, kind[0]: kind[1]}
    )
