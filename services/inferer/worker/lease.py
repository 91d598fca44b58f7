"""The lease on a message: renewed while its job runs, and released with confirmation."""

import asyncio

import msgspec
import nats.errors
from nats.aio.msg import Msg

from shared.background import Tasks
from shared.broker.client import client_of
from shared.broker.connection import RETRY_DELAY_S
from shared.broker.refusals import TRANSIENT
from shared.logs import logger
from shared.timestamps import NANOSECONDS

RENEW_EVERY_S = 3.0
ACK_TIMEOUT_S = 2.0
ACK_ATTEMPTS = 10
LEAST_DELAY_S = 0.001
"""The broker stores when a message is free again only if it is free later: one without a delay
would wait for the end of its lease if the broker is restarted."""

log = logger()


class Lease:
    """Keeps ``message`` ours until it is ended: a lease is short, so that a crash costs seconds."""

    def __init__(self, message: Msg) -> None:
        self._message = message
        self._loop = asyncio.get_running_loop()
        self._renewals = Tasks()
        self._timer = self._loop.call_later(RENEW_EVERY_S, self._renew)

    def end(self) -> None:
        self._timer.cancel()

    def _renew(self) -> None:
        self._timer = self._loop.call_later(RENEW_EVERY_S, self._renew)
        self._renewals.start(_renew(self._message), "renew a lease")


async def acknowledge(message: Msg) -> None:
    """Take the message off the queue and have the broker confirm it.

    Without the confirmation a broker that is killed within 100 ms forgets the ack. One that cannot
    be confirmed in the end only means that the job comes again and finds its result.
    """
    for _ in range(ACK_ATTEMPTS):
        try:
            await message.ack_sync(timeout=ACK_TIMEOUT_S)
            return
        except TRANSIENT:
            await asyncio.sleep(RETRY_DELAY_S)
    log.warning("ack_not_confirmed", subject=message.subject)


async def requeue(message: Msg, delay_s: float = LEAST_DELAY_S) -> None:
    """Let another inferer have the message, after ``delay_s``; waits for a broker that is away.

    The nak is repeated only if it was certainly not received: otherwise it could take the message
    from the inferer that has it by then. If it may have been received, the lease has to expire.
    """
    nak = Msg.Ack.Nak + b" " + msgspec.json.encode({"delay": round(delay_s * NANOSECONDS)})
    client = client_of(message)
    while True:
        if client.is_connected:  # else it would be sent with all that comes later
            try:
                await client.request(message.reply, nak, timeout=ACK_TIMEOUT_S)
                return
            except nats.errors.NoRespondersError:
                pass  # an election
            except TRANSIENT:
                log.warning("nak_not_confirmed", subject=message.subject)
                return
        await asyncio.sleep(RETRY_DELAY_S)


async def _renew(message: Msg) -> None:
    try:
        await message.in_progress()
    except TRANSIENT as error:
        log.warning("lease_not_renewed", subject=message.subject, error=str(error))
