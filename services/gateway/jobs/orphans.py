"""Orphans: jobs whose client timed out and may send the same request again.

Their entries are in the bucket IDEMPOTENCY, so that any gateway can serve the retry, and can cancel
the job if the client does not retry. The gateway that removes an entry gets the job. The broker
reports how many messages a purge removed, so only one of several gateways succeeds.
"""

import asyncio
import time
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency import digest_of
from services.gateway.jobs.idempotency_record import BUCKET
from services.gateway.jobs.jobs import Jobs
from shared.background import Tasks
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.errors import (
    BrokerUnavailable,
    JobAgedOut,
    SluiceError,
    StorageShort,
    StreamRefused,
    UnknownJob,
)
from shared.job_ids import new_job_id
from shared.logs import logger
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.api import Submission
from shared.wire.codecs import decode_orphan_entry, encode
from shared.wire.requests import OrphanEntry

NOTICED_WITHIN_S = 1.0
"""How long a retry waits for its orphan: the gateway that served the client may not have noticed
the disconnect yet."""

LOOK_EVERY_S = 0.1

MOST_AT_ONCE = 500
"""How many entries are read at once, the oldest first."""

log = logger()


class Orphans:
    """Keeps the places of orphans for ``return_s``."""

    def __init__(self, broker: Broker, jobs: Jobs, return_s: float, patience_s: float) -> None:
        self._broker = broker
        self._jobs = jobs
        self._return = timedelta(seconds=return_s)
        self._patience_s = patience_s
        self._adding = Tasks()
        self._in_hand: set[int] = set()
        """The sequence numbers of entries that a retry at this gateway is about to remove."""

    def add(self, accepted: AcceptedJob, submission: Submission) -> None:
        """Keep the place of a job whose client has timed out, in the background."""
        entry = subjects.orphan(_hash(submission, accepted.caller), accepted.id)
        self._adding.start(self._add(accepted.id, entry), f"orphan {accepted.id}")

    async def adopt(self, submission: Submission, caller: Caller) -> AcceptedJob | None:
        """The oldest orphan of the same request and owner, for a client that retries. With None
        the caller submits a new job.

        Raises:
            InvalidRequest: the submission cannot be read.
            BrokerUnavailable: no answer.
        """
        entries = subjects.orphans(_hash(submission, caller))
        give_up_at = time.monotonic() + NOTICED_WITHIN_S
        while True:
            for entry in await self._read(entries):
                if entry.sequence in self._in_hand:
                    continue
                self._in_hand.add(entry.sequence)
                try:
                    job = await self._jobs.brief_status(_job_id(entry))
                    if not await self._take(entry):
                        continue
                except (UnknownJob, JobAgedOut):
                    continue
                finally:
                    self._in_hand.discard(entry.sequence)
                log.info("job_adopted", job_id=job.id, model=job.model, state=job.state)
                format = self._jobs.answer_format(job.model, submission)
                accepted = AcceptedJob.of_replay(job, submission.task, caller, format)
                return replace(accepted, survives_disconnect=False)
            if time.monotonic() >= give_up_at:
                return None
            await asyncio.sleep(LOOK_EVERY_S)

    async def cancel_overdue(self) -> None:
        """Cancel orphans of all gateways that nobody has adopted in time.

        Raises:
            BrokerUnavailable: no answer.
        """
        now = self._broker.now()
        for entry in await self._read(subjects.ORPHANS_WILDCARD):
            if _is_overdue(entry, now) and await self._remove(entry):
                self._jobs.abandon(_job_id(entry))

    async def end(self, patience_s: float) -> None:
        """Write the remaining entries, if the broker answers within ``patience_s``. Jobs without an
        entry run to their end."""
        if left := await self._adding.end(patience_s):
            log.warning("orphans_not_stored", left=left)

    async def _add(self, job_id: str, subject: str) -> None:
        # The same entry in each try: one that was stored and then adopted must not come back.
        entry = encode(OrphanEntry(timestamp(self._broker.now() + self._return)))
        headers = {subjects.HEADER_MSG_ID: new_job_id()}
        refusal = await self._broker.through_outages(partial(self._store, subject, entry, headers))
        if refusal is None:
            log.info("job_orphaned", job_id=job_id)
        else:
            log.warning("orphan_not_stored", job_id=job_id, error=refusal.message)
            self._jobs.abandon(job_id)

    async def _store(
        self, subject: str, entry: bytes, headers: dict[str, str]
    ) -> SluiceError | None:
        """Why the broker refuses the entry; None if it was stored."""
        try:
            await self._broker.publish_stored(subject, entry, headers, self._patience_s)
        except (StorageShort, StreamRefused) as error:
            return error
        return None

    async def _read(self, wildcard: str) -> list[StoredMessage]:
        return await self._broker.direct_get_all(
            BUCKET, seq=1, next_by_subj=wildcard, batch=MOST_AT_ONCE
        )

    async def _take(self, entry: StoredMessage) -> bool:
        """Remove the entry of a job that a retry adopts. Returns whether the retry gets the job.

        Raises:
            BrokerUnavailable: the entry is still there, or its state is unknown.
        """
        try:
            return await self._remove(entry)
        except BrokerUnavailable as error:
            # The reply may have been lost. If the entry is gone, it may be that nobody else has the
            # job. Two clients that read one job are better than none.
            read = partial(self._broker.leader_get, BUCKET, last_by_subj=entry.subject)
            try:
                async with asyncio.timeout(self._patience_s):
                    left = await self._broker.through_outages(read)
            except TimeoutError:
                raise error from None
            if left is not None and left.sequence == entry.sequence:
                raise
            return True

    async def _remove(self, entry: StoredMessage) -> bool:
        """Whether this call removed the entry."""
        return await self._broker.purge(BUCKET, entry.subject, entry.sequence) > 0


def _hash(submission: Submission, caller: Caller) -> str:
    return sha256(f"{caller.owner}\0{digest_of(submission)}".encode()).hexdigest()


def _job_id(entry: StoredMessage) -> str:
    return subjects.model_and_id(entry.subject)[1]


def _is_overdue(entry: StoredMessage, now: datetime) -> bool:
    """True also for an unreadable entry, which no gateway wrote."""
    read = decode_orphan_entry.read(entry.data, entry.subject)
    try:
        return read is None or parse_timestamp(read.until) <= now
    except ValueError:
        return True
