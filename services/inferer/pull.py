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
NANOSECOND = 1_000_000_000

HEARTBEAT = "100"
ENDED = ("404", "408")
"""The pull ran out, or there was nothing: ask again at once."""

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
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        broker.on_reconnect(lambda: self._arrived.put_nowait(None))

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
        assert self._subscription is not None
        try:
            # Draining, not unsubscribing: what is on its way still reaches `_receive`.
            async with asyncio.timeout(1):
                await self._subscription.drain()  # type: ignore[no-untyped-call]
        except (*TRANSIENT, TimeoutError):
            log.warning("pull_not_withdrawn")
        while not self._arrived.empty():
            message = self._arrived.get_nowait()
            if message is not None and "Status" not in (message.headers or {}):
                await message.nak()

    async def next(self) -> Msg:
        """The next job's message, however long it takes; through outages of the broker too."""
        self._wanted = True
        while True:
            await self._ask()
            try:
                message = await self._outcome()
            except TimeoutError:
                continue  # two heartbeats missed: the pull is lost
            if message is None:
                continue
            status = (message.headers or {}).get("Status")
            if status is None:
                return message
            if status not in ENDED:
                await asyncio.sleep(RETRY_DELAY_S)

    async def _ask(self) -> None:
        self._pulls += 1
        while not self._arrived.empty():
            self._arrived.get_nowait()
        try:
            await self._broker.nc.publish(
                self._subject, self._request, reply=f"{self._inbox}.{self._pulls}"
            )
        except TRANSIENT:
            await asyncio.sleep(RETRY_DELAY_S)

    async def _outcome(self) -> Msg | None:
        """The job, the status that ended this pull, or None when the connection is a new one."""
        while True:
            async with asyncio.timeout(2 * HEARTBEAT_S + 1):
                message = await self._arrived.get()
            if message is None or (message.headers or {}).get("Status") != HEARTBEAT:
                return message

    async def _receive(self, message: Msg) -> None:
        if "Status" in (message.headers or {}):
            if message.subject == f"{self._inbox}.{self._pulls}":
                self._arrived.put_nowait(message)
        elif self._wanted:
            self._wanted = False
            self._arrived.put_nowait(message)
        else:
            # A slot never holds two: this one came for a pull that was given up.
            await message.nak()
