"""Jobs that the broker did not confirm, and whose callers got an error."""

import asyncio
import time

from msgspec.structs import replace

from services.gateway.jobs.accepted import Ticket
from services.gateway.jobs.cancellation import Stopping
from services.gateway.state.pending_job import find_unfinished
from shared.background import Tasks
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.results import store_result
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.timestamps import timestamp
from shared.wire.results import Cancelled, Result, stopped

MAY_ARRIVE_S = 60.0
"""For this long after a reconnect the message is searched for: a broker that hung handles earlier
data when it recovers."""

LOOK_S = 1.0

log = logger()


class Withdrawals:
    """Ensures, in the background, that such a job ends as `cancelled`."""

    def __init__(self, broker: Broker, stopping: Stopping, tasks: Tasks) -> None:
        self._broker = broker
        self._stopping = stopping
        self._tasks = tasks
        self._is_ending = False

    def end(self) -> None:
        """Look for each message once more at most: what arrives later ends with the result."""
        self._is_ending = True

    def withdraw(self, ticket: Ticket) -> None:
        """Cancel the job as soon as the broker answers, however late it arrives there."""
        self._tasks.start(self._withdraw(ticket), f"withdraw {ticket.id}")

    async def _withdraw(self, ticket: Ticket) -> None:
        # The result first, and without looking for the job: what arrives later ends with it.
        stored = await self._store(ticket)
        if not isinstance(stored, Cancelled):
            log.warning("job_not_withdrawn", job_id=ticket.id, outcome=type(stored).__name__)
            return
        give_up_at: float | None = None
        while give_up_at is None or time.monotonic() < give_up_at:
            try:
                job = await find_unfinished(self._broker, ticket.id, from_leader=True)
                if job is not None:
                    await self._stopping.notify(ticket.id, "cancelled")
                    await self._stopping.finish(job, stored)
                if job is not None or self._is_ending:
                    break
                give_up_at = give_up_at or time.monotonic() + MAY_ARRIVE_S
                await asyncio.sleep(LOOK_S)
            except BrokerUnavailable:
                give_up_at = None
                await self._broker.until_connected()
                await asyncio.sleep(RETRY_DELAY_S)
        log.info("job_withdrawn", job_id=ticket.id, arrived=job is not None)

    async def _store(self, ticket: Ticket) -> Result:
        while True:
            await self._broker.until_connected()
            now = timestamp(self._broker.now())
            cancelled = stopped(
                "cancelled",
                id=ticket.id,
                model=ticket.model,
                attempt=0,
                queued_at=ticket.queued_at,
                finished_at=now,
                priority=ticket.priority,
            )
            why = "the broker did not confirm the job in time, and its caller got an error"
            try:
                return await store_result(self._broker, replace(cancelled, message=why), 0)
            except BrokerUnavailable:
                await asyncio.sleep(RETRY_DELAY_S)
