"""A key's entry in the bucket IDEMPOTENCY: which job the key stands for, and who may publish it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

import nats.js.errors

from shared.broker.connection import Broker, unavailable_on_outage
from shared.errors import (
    BrokerUnavailable,
    KeyReused,
    RequestTooLarge,
    StorageShort,
    StoredAlready,
    StreamRefused,
)
from shared.job_ids import accepted_at, is_job_id, new_job_id
from shared.logs import logger
from shared.retention import IDEMPOTENCY_RETENTION
from shared.wire import subjects
from shared.wire.codecs import decode_idempotency_entry, encode
from shared.wire.requests import IdempotencyEntry

BUCKET = f"KV_{subjects.IDEMPOTENCY}"

log = logger()


class Overtaken(Exception):
    """Another gateway has written the key's entry meanwhile: read it again."""


@dataclass(frozen=True)
class IdempotencyRecord:
    """What a key stood for when it was read. A new record replaces it by compare-and-set, which
    fails if another gateway was first."""

    subject: str
    digest: str
    job_id: str | None
    """The job; None while the key is free."""
    sequence: int
    """Of the entry, or of the marker that an expired one leaves; 0 if there is neither."""

    @asynccontextmanager
    async def held(self, broker: Broker, job_id: str, patience_s: float) -> AsyncIterator[None]:
        """Write the key's record for ``job_id``, which the block publishes.

        If the publish is definitely refused, the key is released. If it is not known whether the
        job arrived, the record stays: a client that repeats the request finds the job, or
        publishes it.

        Raises:
            Overtaken, BrokerUnavailable, StorageShort.
        """
        entry = encode(IdempotencyEntry(job_id, self.digest))
        # An id of its own makes a retry of this write a duplicate, not a refusal; so a
        # refusal always means that another gateway was first.
        headers = {
            subjects.HEADER_EXPECTED_LAST: str(self.sequence),
            subjects.HEADER_MSG_ID: new_job_id(),
        }
        try:
            stored = await broker.publish_stored(self.subject, entry, headers, patience_s)
        except StoredAlready:
            raise Overtaken from None
        try:
            yield
        except (StorageShort, RequestTooLarge, StreamRefused):
            # An entry that was there before may be that of a gateway that is only slow.
            if self.job_id is None:
                await self._release(broker, stored.seq)
            raise

    async def _release(self, broker: Broker, sequence: int) -> None:
        # A purge, because it needs no storage; only up to this sequence, because another gateway
        # may have replaced our entry since, and published its job.
        try:
            await broker.purge(BUCKET, self.subject, sequence)
        except BrokerUnavailable as error:
            log.warning("key_not_released", error=error.message)


async def read_record(broker: Broker, subject: str, digest: str) -> IdempotencyRecord:
    """What the key at ``subject`` stands for, for a request that has this ``digest``.

    Raises:
        KeyReused: something else was submitted under it.
        BrokerUnavailable: no answer.
    """
    with unavailable_on_outage(broker):
        try:
            # From the leader: a replica may not have the latest entry yet.
            stored = await broker.js.get_last_msg(BUCKET, subject)
        except nats.js.errors.NotFoundError:
            return IdempotencyRecord(subject, digest, None, 0)
    entry = _read(stored.data or b"", subject, broker.now())
    if entry is not None and entry.digest != digest:
        raise KeyReused(
            f"{subjects.HEADER_IDEMPOTENCY_KEY}: this key was sent with another request before; "
            "use a new one"
        )
    return IdempotencyRecord(subject, digest, None if entry is None else entry.id, stored.seq or 0)


def _read(data: bytes, subject: str, now: datetime) -> IdempotencyEntry | None:
    """The entry; None for the marker of one that has expired, and for what was put there by hand.

    An entry is written again when its job has to be published again, which restarts its TTL in
    the bucket; the time in the job's id is that of the first use of the key.
    """
    entry = decode_idempotency_entry.read(data, subject) if data else None
    if (
        entry is None
        or not is_job_id(entry.id)
        or now - accepted_at(entry.id) > IDEMPOTENCY_RETENTION
    ):
        return None
    return entry
