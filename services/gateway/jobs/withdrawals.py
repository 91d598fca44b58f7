"""Jobs that the broker did not confirm, and whose callers got an error."""

import asyncio
import time
from functools import partial

from msgspec.structs import replace

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.cancellation import Cancellation
from services.gateway.state.pending_job import find_pending_job
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

SEARCH_EVERY_S = 1.0

log = logger()


class Withdrawals:
    """Ensures, in the background, that such a job ends as `cancelled`."""

    def __init__(self, broker: Broker, cancellation: Cancellation, tasks: Tasks) -> None:
        self._broker = broker
        self._cancellation = cancellation
        self._tasks = tasks
        self._is_ending = False

    def end(self) -> None:
        """Search for each message once more at most: what arrives later ends with the result."""
        self._is_ending = True

    def withdraw(self, accepted: AcceptedJob) -> None:
        """Cancel the job as soon as the broker answers, however late it arrives there."""
        self._tasks.start(self._withdraw(accepted), f"withdraw {accepted.id}")

    async def _withdraw(self, accepted: AcceptedJob) -> None:
        # The result first, and without a search for the job: what arrives later ends with it.
        stored = await self._broker.through_outages(partial(self._store, accepted))
        if not isinstance(stored, Cancelled):
            log.warning("job_not_withdrawn", job_id=accepted.id, outcome=type(stored).__name__)
            return
        give_up_at: float | None = None
        while give_up_at is None or time.monotonic() < give_up_at:
            try:
                job = await find_pending_job(self._broker, accepted.id, from_leader=True)
                if job is not None:
                    await self._cancellation.notify(accepted.model, accepted.id, "cancelled")
                    await self._cancellation.finish(job, stored)
                if job is not None or self._is_ending:
                    break
                give_up_at = give_up_at or time.monotonic() + MAY_ARRIVE_S
                await asyncio.sleep(SEARCH_EVERY_S)
            except BrokerUnavailable:
                give_up_at = None
                await self._broker.until_connected()
                await asyncio.sleep(RETRY_DELAY_S)
        log.info("job_withdrawn", job_id=accepted.id, arrived=job is not None)

    async def _store(self, accepted: AcceptedJob) -> Result:
        cancelled = stopped(
            "cancelled",
            id=accepted.id,
            model=accepted.model,
            attempt=0,
            queued_at=accepted.queued_at,
            finished_at=timestamp(self._broker.now()),
            owner=accepted.caller.owner,
            priority=accepted.priority,
            via=accepted.caller.via,
        )
        why = "the broker did not confirm the job in time, and its caller got an error"
        return await store_result(
            self._broker, replace(cancelled, message=why), 0, accepted.caller.trace
        )
