"""Delivers requests to the NATS service: only those with an inbox, concurrently, and before a
shutdown all of them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.background import start
from shared.errors import Overloaded
from shared.logs import logger
from shared.wire.replies import is_inbox

MOST_AT_ONCE = 5000
MOST_BYTES_AT_ONCE = 32 * 1024 * 1024
"""Limits of one endpoint. Requests take several times as much memory while they are handled."""

SIDE_BY_SIDE = 200
"""How many of them are handled concurrently; the others wait. Thousands of publishes at once would
take a busy broker longer than the timeout of each."""

CANCEL_S = 1.0

log = logger()


class Requests:
    """Stands in for the client of nats.micro, which subscribes and flushes through it.

    On its own, nats.micro replies to any subject, handles the requests of an endpoint one after
    another, and loses those that have arrived when it stops.
    """

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._nuid = nc._nuid  # nats.micro generates the service's id with it
        self._subscriptions: list[Subscription] = []
        self._in_progress: set[asyncio.Task[None]] = set()

    async def subscribe(
        self, subject: str, queue: str = "", *, cb: Callable[[Msg], Awaitable[None]]
    ) -> Subscription:
        """Call ``cb`` for each message in its own task, unless its reply subject is not an
        inbox."""

        async def receive(message: Msg) -> None:
            if message.reply and not is_inbox(message.reply):
                log.warning(
                    "request_refused",
                    subject=message.subject[:100],
                    reply_to=message.reply[:100],
                    why="the reply subject is not a client's inbox",
                )
                return
            task = start(_answered(cb, message), "answer a request")
            self._in_progress.add(task)
            task.add_done_callback(self._in_progress.discard)

        subscription = await self._nc.subscribe(subject, queue=queue, cb=receive)
        self._subscriptions.append(subscription)
        return subscription

    async def flush(self) -> None:
        """Return when the broker knows the subscriptions, however long it is away."""
        while True:
            try:
                return await self._nc.flush()
            except nats.errors.TimeoutError as error:
                log.warning("broker_does_not_answer", why=str(error))

    async def drain(self, patience_s: float) -> None:
        """Unsubscribe, and finish the requests that the broker has already sent.

        What is not done within ``patience_s`` is cancelled.
        """
        try:
            async with asyncio.timeout(patience_s):
                # Each of these also waits until what was on its way here has arrived.
                await asyncio.gather(*(_drained(one) for one in self._subscriptions))
                while self._in_progress:
                    await asyncio.wait(self._in_progress)
        except (TimeoutError, nats.errors.Error) as error:
            log.warning("requests_not_drained", left=len(self._in_progress), why=repr(error))
        for task in self._in_progress:
            task.cancel()
        if self._in_progress:
            await asyncio.wait(self._in_progress, timeout=CANCEL_S)


async def _answered(answer: Callable[[Msg], Awaitable[None]], message: Msg) -> None:
    """nats.micro raises where there is no reply subject, or where the reply cannot be sent."""
    try:
        await answer(message)
    except (nats.errors.Error, ValueError) as error:
        log.warning("request_not_answered", subject=message.subject[:100], why=str(error))


async def _drained(subscription: Subscription) -> None:
    await subscription.drain()  # type: ignore[no-untyped-call]


class InFlight:
    """The requests of one endpoint that are being handled: a bounded number of bounded size."""

    def __init__(self, most: int = MOST_AT_ONCE, most_bytes: int = MOST_BYTES_AT_ONCE) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._count = self._bytes = 0
        self.turn = asyncio.Semaphore(SIDE_BY_SIDE)
        """To be held while a request is worked on."""

    @contextmanager
    def admitted(self, size: int) -> Iterator[None]:
        """A request of ``size`` bytes is handled in the block.

        Raises:
            Overloaded: too much is being handled; one request is always taken.
        """
        if self._count and (self._count >= self._most or self._bytes + size > self._most_bytes):
            raise Overloaded(
                f"this gateway is already handling {self._count} such requests of {self._bytes} "
                "bytes; nothing was done, try again in a moment"
            )
        self._count += 1
        self._bytes += size
        try:
            yield
        finally:
            self._count -= 1
            self._bytes -= size
