"""Checks whether callers are still subscribed: core NATS does not report that they disconnect."""

import asyncio
from functools import partial

import msgspec
import nats.errors
from nats.aio.msg import Msg

from shared.broker.client import resolve
from shared.broker.connection import REQUEST_TIMEOUT_S, Broker, unavailable_on_outage
from shared.errors import BrokerUnavailable

CHECKS_AT_ONCE = 100

FIRST_CHECK_S = 0.5
"""Most short jobs have ended by then."""

CHECK_EVERY_S = 0.5
CHECKS_PER_S = 1000
"""A sixth of a core; with more than 500 callers each is checked less often."""

LEFT_S = 3.2
"""A caller without a subscription in two checks this far apart is gone. Clients that reconnect are
away for 2 s by default, some of them for up to 3 s with TLS."""

INBOX = "_INBOX"
"""The prefix of inboxes whose subscribers the broker can see. Those of another account or cluster
have other prefixes."""


class Interest:
    """Asks the broker who subscribes, and sends nothing that a subscriber would read."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._checking = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._watched = 0
        self._reconnects = 0
        broker.on_reconnect(self._count_reconnect)

    async def lost(self, inbox: str) -> None:
        """Return once ``inbox`` has had no subscriber for `LEFT_S`."""
        self._watched += 1
        try:
            pause_s, missed_at = FIRST_CHECK_S, None
            while True:
                await asyncio.sleep(pause_s)
                if await self.exists(inbox):
                    pause_s, missed_at = max(CHECK_EVERY_S, self._watched / CHECKS_PER_S), None
                elif missed_at == self._reconnects:
                    return
                else:
                    # After our own reconnect counting starts again: callers may not be back yet.
                    pause_s, missed_at = LEFT_S, self._reconnects
        finally:
            self._watched -= 1

    async def exists(self, inbox: str) -> bool:
        """Whether ``inbox`` has a subscriber; True unless the broker says that it has none."""
        if not inbox.startswith(INBOX):
            return True
        async with self._checking:
            try:
                return await self._would_be_delivered(inbox)
            except (BrokerUnavailable, nats.errors.Error, TimeoutError, ValueError):
                return True

    async def _would_be_delivered(self, inbox: str) -> bool:
        """The broker reports where a message would go, and does not deliver it (ADR-41)."""
        nc = self._broker.nc
        with unavailable_on_outage(self._broker):
            reported: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
            report_to = await nc.open_inbox(partial(resolve, reported))
            try:
                headers = {"Nats-Trace-Dest": report_to, "Nats-Trace-Only": "true"}
                await nc.publish(inbox, headers=headers)
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    report = await reported
            finally:
                nc.close_inbox(report_to)
        events = msgspec.json.decode(report.data, type=_Report).events
        return any(event.type != "in" or event.error for event in events)

    def _count_reconnect(self) -> None:
        self._reconnects += 1


class _Event(msgspec.Struct):
    """``in``: the message arrived. Other types say where it went, ``eg`` for each subscriber."""

    type: str
    error: str = ""


class _Report(msgspec.Struct):
    events: list[_Event]
