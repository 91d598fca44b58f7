"""Pulling one message at a time, with pull requests of our own.

The client's `fetch` cannot name a priority group, hides the broker's status messages, and leaves
a live pull behind when it is cancelled, which swallows the next job until its lease ends.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.background import Tasks
from shared.broker.client import all_received
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.refusals import TRANSIENT
from shared.logs import logger
from shared.timestamps import NANOSECONDS
from shared.wire import subjects

EXPIRES_S = 6
"""Short: a job that is delivered to a pull behind a hung node is lost for a whole lease."""
HEARTBEAT_S = 2
LOST_AFTER_S = 2 * HEARTBEAT_S + 1
"""A pull without two heartbeats in a row is lost."""

ANSWER_S = 0.25
"""If a priority has jobs but has reached its limit, the broker does not answer: the pull waits,
although it asks not to. So the next priority is tried after this time; a late answer counts."""

ECHO_S = 2.0
"""How long to wait for what was on its way when the pulls were withdrawn."""

FAIR_S = 60.0
"""A priority that has not been pulled for this long is pulled first: none can starve."""

ACK_PREFIX = "$JS.ACK."
HEARTBEAT, NONE_THERE, EXPIRED = "100", "404", "408"
DELIVERED, RECONNECTED, LOST = "delivered", "reconnected", "lost"
ASK: dict[str, int] = {"no_wait": True}
WAIT = {"expires": EXPIRES_S * NANOSECONDS, "idle_heartbeat": HEARTBEAT_S * NANOSECONDS}
"""What makes a pull one that is answered at once, or one that waits for a job."""

AT_ONCE = (NONE_THERE, EXPIRED, DELIVERED, RECONNECTED, LOST)
"""Endings of a pull after which the next may follow at once; after a refusal it may not."""

log = logger()


class Puller:
    """One inferer's pulls, for one message at a time.

    The priorities are pulled one after another, the highest first; when all of them are empty, a
    pull waits at each, and the first message ends the others. A job that is delivered to a pull
    that was ended is requeued.
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
        self._model = model
        self._fair_s = fair_s
        self._priority = priority
        self._asked_at = dict.fromkeys(subjects.PRIORITIES, time.monotonic())
        self._watchdogs: dict[str, asyncio.TimerHandle] = {}
        """One for each pull under way, by the subject that its status comes to."""
        self._job: Msg | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._withdrawals = Tasks()
        self._echo_inbox = broker.nc.new_inbox()
        self._echo: Subscription | None = None
        self._tokens = itertools.count()
        self._echoes: dict[bytes, asyncio.Future[None]] = {}
        self._forget = broker.on_reconnect(self._reconnected)

    async def __aenter__(self) -> Self:
        self._echo = await self._broker.nc.subscribe(self._echo_inbox, cb=self._on_echo)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.withdraw()
        self._forget()
        if self._echo is not None:
            await self._drop(self._echo)

    async def withdraw(self) -> None:
        """Return when nothing is pulled, after a call of `next` was cancelled. A job that came all
        the same is requeued."""
        await self._withdrawals.end(ECHO_S)
        if self._job is not None:
            job, self._job = self._job, None
            await job.nak()

    async def next(self) -> Msg:
        """The next job's message, however long it takes; through outages of the broker too."""
        while self._job is None:
            await self._pull_next()
        # Also one that came after an earlier call had been cancelled.
        job, self._job = self._job, None
        return job

    async def _pull_next(self) -> None:
        """Pull the priorities in their order, then wait at all of them until something happens."""
        if not self._broker.is_connected:
            # The client would buffer a pull and send it when the broker is back.
            await asyncio.sleep(RETRY_DELAY_S)
            return
        # A subscription of its own: ending it withdraws what still waits at the broker.
        inbox = self._broker.nc.new_inbox()
        try:
            answers = await self._broker.nc.subscribe(f"{inbox}.*.*", cb=self._receive)
        except TRANSIENT:
            await asyncio.sleep(RETRY_DELAY_S)
            return
        try:
            for priority in self._in_order():
                await self._pull(f"{inbox}.ask", (priority,), ASK, ANSWER_S)
                if self._job is not None:
                    return
            await self._pull(f"{inbox}.wait", subjects.PRIORITIES, WAIT, LOST_AFTER_S)
        finally:
            self._withdrawals.start(self._withdraw(answers), "withdraw a pull")

    def _in_order(self) -> list[str]:
        """The priorities to pull before waiting: the highest first, but before all others one that
        is overdue.

        The lowest need not be pulled: a waiting pull does the same.
        """
        highest_first = list(subjects.PRIORITIES[:-1])
        longest_ago = min(self._asked_at, key=self._asked_at.__getitem__)
        if time.monotonic() - self._asked_at[longest_ago] < self._fair_s:
            return highest_first
        return [longest_ago, *(other for other in highest_first if other != longest_ago)]

    async def _pull(
        self, inbox: str, priorities: tuple[str, ...], kind: dict[str, int], lost_after_s: float
    ) -> None:
        """One pull at each of ``priorities``, until one of them has ended in any way."""
        group = {"batch": 1, "group": subjects.PRIORITY_GROUP, "priority": self._priority()}
        request = msgspec.json.encode({**group, **kind})
        self._ended = asyncio.get_running_loop().create_future()
        try:
            for priority in priorities:
                self._asked_at[priority] = time.monotonic()
                self._watch(f"{inbox}.{priority}", lost_after_s)
                consumer = subjects.consumer(self._model, priority)
                await self._broker.nc.publish(
                    f"$JS.API.CONSUMER.MSG.NEXT.{subjects.REQUESTS}.{consumer}",
                    request,
                    reply=f"{inbox}.{priority}",
                )
            how = await self._ended
        except TRANSIENT as error:
            how = type(error).__name__
        finally:
            self._end("withdrawn")
        if how not in AT_ONCE:
            await asyncio.sleep(RETRY_DELAY_S)

    async def _withdraw(self, answers: Subscription) -> None:
        """End a subscription and with it its pulls; what is on its way still gets to `_receive`."""
        try:
            if self._broker.is_connected:
                await self._broker.nc.end_at_broker(answers)
                # What the broker had sent before comes before the echo of what it gets afterwards.
                # The client's own flush would do, but one that is late breaks its connection.
                # From a node that hangs it comes late, and so may a job, which is requeued.
                await self._round_trip()
                await all_received(answers)
        except TRANSIENT:
            log.warning("pull_not_withdrawn")
        finally:
            await self._drop(answers)

    async def _drop(self, subscription: Subscription) -> None:
        """Forget it here, whatever the broker knows: a reconnect would subscribe to it again."""
        with suppress(*TRANSIENT, nats.errors.BadSubscriptionError):
            await subscription.unsubscribe()

    async def _round_trip(self) -> None:
        """Send a message to ourselves through the broker, and wait for it."""
        token = str(next(self._tokens)).encode()
        echo = self._echoes[token] = asyncio.get_running_loop().create_future()
        try:
            await self._broker.nc.publish(self._echo_inbox, token)
            await echo
        finally:
            del self._echoes[token]

    def _reconnected(self) -> None:
        """What was on its way is lost with the connection."""
        self._end(RECONNECTED)
        for echo in self._echoes.values():
            if not echo.done():
                echo.set_result(None)

    async def _on_echo(self, message: Msg) -> None:
        echo = self._echoes.get(message.data)
        if echo is not None and not echo.done():
            echo.set_result(None)

    def _watch(self, reply: str, lost_after_s: float) -> None:
        if (watchdog := self._watchdogs.get(reply)) is not None:
            watchdog.cancel()
        loop = asyncio.get_running_loop()
        self._watchdogs[reply] = loop.call_later(lost_after_s, self._end, LOST)

    def _end(self, how: str) -> None:
        """End all pulls under way."""
        for watchdog in self._watchdogs.values():
            watchdog.cancel()
        self._watchdogs.clear()
        if not self._ended.done():
            self._ended.set_result(how)

    async def _receive(self, message: Msg) -> None:
        if not message.reply.startswith(ACK_PREFIX):
            # A status; a job has its acknowledgement as reply, whatever its headers say.
            if message.subject not in self._watchdogs:
                return  # of a pull that was ended
            status = (message.headers or {}).get("Status", "")
            if status == HEARTBEAT:
                self._watch(message.subject, LOST_AFTER_S)
            else:
                self._end(status)
        elif self._watchdogs and self._job is None:
            self._job = message
            self._end(DELIVERED)
        else:
            # Never two at a time: this one came for a pull that was ended.
            await message.nak()
