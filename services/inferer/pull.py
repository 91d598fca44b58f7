"""Pulling one message at a time, with pull requests of our own.

The client's `fetch` cannot name a priority group, hides the broker's status messages, and leaves
a live pull behind when it is cancelled, which swallows the next job until its lease ends.
"""

import asyncio
from types import TracebackType
from typing import Self

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared import subjects
from shared.broker import RETRY_DELAY_S, TRANSIENT, Broker
from shared.logs import logger

EXPIRES_S = 30
HEARTBEAT_S = 5
LOST_AFTER_S = 2 * HEARTBEAT_S + 1
"""A pull without two heartbeats in a row is lost."""
NANOSECOND = 1_000_000_000

ACK_PREFIX = "$JS.ACK."
HEARTBEAT = "100"
DELIVERED, RECONNECTED, LOST = "delivered", "reconnected", "lost"
AT_ONCE = ("404", "408", DELIVERED, RECONNECTED, LOST)
"""Ways in which a pull ends after which the next may follow at once; not after a refusal."""

log = logger()


class Puller:
    """One slot's pulls: at most one under way, none while the slot works.

    Leaving the block withdraws the pull that is under way; a job that comes all the same is
    given back.
    """

    def __init__(self, broker: Broker, model: str, priority: int = 0) -> None:
        self._broker = broker
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{subjects.REQUESTS}.{model}"
        self._request = msgspec.json.encode(
            {
                "batch": 1,
                "expires": EXPIRES_S * NANOSECOND,
                "idle_heartbeat": HEARTBEAT_S * NANOSECOND,
                "group": subjects.PRIORITY_GROUP,
                "priority": priority,
            }
        )
        self._inbox = broker.nc.new_inbox()
        self._pulls = 0
        self._wanted = False
        self._job: Msg | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watchdog: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        broker.on_reconnect(lambda: self._end(RECONNECTED))

    async def __aenter__(self) -> Self:
        self._subscription = await self._broker.nc.subscribe(f"{self._inbox}.*", cb=self._receive)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wanted = False
        self._stop_watchdog()
        assert self._subscription is not None
        try:
            # Draining, not unsubscribing: what is on its way still reaches `_receive`.
            async with asyncio.timeout(1):
                # The drain's ping overtakes its own unsubscribe, which the client writes a moment
                # later; a job that comes in between would be dropped. So that is sent before.
                await self._broker.nc._send_unsubscribe(self._subscription._id)
                await self._broker.nc.flush()
                await self._subscription.drain()  # type: ignore[no-untyped-call]
        except (*TRANSIENT, TimeoutError):
            log.warning("pull_not_withdrawn")
        if self._job is not None:
            await self._job.nak()

    async def next(self) -> Msg:
        """The next job's message, however long it takes; through outages of the broker too."""
        while True:
            if self._job is None:
                self._wanted = True
                await self._pull()
            if self._job is not None:
                # Also one that came after an earlier call had been cancelled.
                job, self._job = self._job, None
                return job

    async def _pull(self) -> None:
        """One pull, until it has ended in one way or another."""
        self._pulls += 1
        self._ended = asyncio.get_running_loop().create_future()
        self._expect_heartbeat()
        try:
            await self._broker.nc.publish(
                self._subject, self._request, reply=f"{self._inbox}.{self._pulls}"
            )
            how = await self._ended
        except TRANSIENT as error:
            how = type(error).__name__
        if how not in AT_ONCE:
            await asyncio.sleep(RETRY_DELAY_S)

    def _expect_heartbeat(self) -> None:
        self._stop_watchdog()
        loop = asyncio.get_running_loop()
        self._watchdog = loop.call_later(LOST_AFTER_S, self._end, LOST)

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _end(self, how: str) -> None:
        self._stop_watchdog()
        if not self._ended.done():
            self._ended.set_result(how)

    async def _receive(self, message: Msg) -> None:
        if not message.reply.startswith(ACK_PREFIX):
            # A status; a job has its acknowledgement as reply, whatever its headers say.
            status = (message.headers or {}).get("Status", "")
            if message.subject != f"{self._inbox}.{self._pulls}":
                return  # of an earlier pull
            if status == HEARTBEAT:
                self._expect_heartbeat()
            else:
                self._end(status)
        elif self._wanted:
            self._wanted = False
            self._job = message
            self._end(DELIVERED)
        else:
            # A slot never holds two: this one came for a pull that was given up.
            await message.nak()
