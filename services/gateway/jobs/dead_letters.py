"""Dead letters: listed, retried, dropped."""

from dataclasses import dataclass
from typing import Self

from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency import Idempotency
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.errors import BrokerUnavailable, CannotRetry, UnknownDeadLetter
from shared.logs import logger
from shared.retention import MAX_JOB_LIFETIME
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.api import DeadLetterHead, DeadLetterPage, JobAccepted, Submission
from shared.wire.codecs import (
    Unreadable,
    decode_dead_letter,
    decode_dead_letter_head,
    decode_request,
)
from shared.wire.requests import InferenceRequest
from shared.wire.results import DeadLetter

SIZE_OF_A_READ = 16 * 1024 * 1024
"""Letters contain whole requests, and nats-py drops messages that arrive too fast."""

FIRST_WIDTH = 8
PAGE_BYTES = 32 * 1024 * 1024
"""A page ends with the read that exceeds this: a letter may have several megabytes."""

log = logger()


class Resubmission(Submission, frozen=True, kw_only=True, omit_defaults=True):
    """A copy of an earlier request, with ``retry_of``, which clients cannot set."""

    retry_of: str | None = None


class DeadLetters:
    """Lists, shows, retries and drops dead letters, which are stored in the stream DEAD."""

    def __init__(self, broker: Broker, idempotency: Idempotency) -> None:
        self._broker = broker
        self._idempotency = idempotency

    async def page(self, limit: int, before: int | None = None) -> DeadLetterPage:
        """At most ``limit`` letters, the newest first; ``before`` is that of the previous page.
        A page of large letters is shorter.

        Raises:
            BrokerUnavailable: no answer.
        """
        newest = await self._broker.direct_get(subjects.DEAD, last_by_subj=subjects.DEAD_WILDCARD)
        end = 1 if newest is None else newest.sequence + 1
        if before is not None:
            end = min(end, before)
        found: list[_Listed] = []
        width = min(limit + 1, FIRST_WIDTH)
        # One more than the limit says whether there is another page.
        while end > 1 and len(found) <= limit and sum(one.size for one in found) < PAGE_BYTES:
            # The broker reads forwards only. Where letters were dropped there are gaps.
            start = max(1, end - width)
            found = await self._between(start, end) + found
            end, width = start, 2 * width
        shown = found[::-1][:limit]
        if len(found) > limit:
            end = shown[-1].sequence
        is_last = len(found) <= limit and not await self._is_any_before(end)
        return DeadLetterPage(letters=[one.head for one in shown], before=None if is_last else end)

    async def show(self, job_id: str) -> DeadLetter:
        """Raises: UnknownDeadLetter, BrokerUnavailable."""
        return _read(await self._find(job_id))

    async def retry(self, job_id: str, caller: Caller) -> JobAccepted:
        """Submit the letter's request as a new job, then drop the letter. For 24 hours another
        retry of the same letter, at the same moment or if it was not dropped, returns that job.

        Raises:
            UnknownDeadLetter, BrokerUnavailable.
            CannotRetry: it does not hold a request.
            SluiceError: as `Idempotency.submit`; the letter stays.
        """
        stored = await self._find(job_id)
        # No header holds a NUL, so no client can have sent this key.
        key = f"retry\0{job_id}"
        accepted = await self._idempotency.submit_once(_resubmission(_read(stored)), caller, key)
        log.info("dead_letter_retried", job_id=job_id, retried_as=accepted.id)
        try:
            await self._broker.delete(subjects.DEAD, stored.sequence)
        except BrokerUnavailable as error:
            # The new job was accepted, and the caller must get its id.
            log.warning("dead_letter_not_dropped", job_id=job_id, error=error.message)
        return JobAccepted.of(accepted.id, accepted.state, retry_of=job_id)

    async def drop(self, job_id: str) -> DeadLetterHead:
        """Remove the letter for good.

        Raises:
            UnknownDeadLetter, BrokerUnavailable.
        """
        stored = await self._find(job_id)
        await self._broker.delete(subjects.DEAD, stored.sequence)
        log.info("dead_letter_dropped", job_id=job_id)
        return DeadLetterHead.of(_read(stored))

    async def _find(self, job_id: str) -> StoredMessage:
        stored = None
        if subjects.is_token(job_id):
            stored = await self._broker.direct_get(
                subjects.DEAD, last_by_subj=subjects.dead_of(job_id)
            )
        if stored is None:
            raise UnknownDeadLetter(f"there is no dead letter {job_id}; see sluice dead list")
        return stored

    async def _between(self, start: int, end: int) -> list["_Listed"]:
        """All letters with a sequence from ``start`` to before ``end``, the oldest first."""
        found: list[_Listed] = []
        while start < end:
            batch = await self._broker.direct_get_all(
                subjects.DEAD,
                seq=start,
                next_by_subj=subjects.DEAD_WILDCARD,
                batch=end - start,
                max_bytes=SIZE_OF_A_READ,
            )
            if not batch:
                break
            found += [_Listed.of(stored) for stored in batch if stored.sequence < end]
            start = batch[-1].sequence + 1
        return found

    async def _is_any_before(self, end: int) -> bool:
        if end <= 1:
            return False
        oldest = await self._broker.direct_get(
            subjects.DEAD, seq=1, next_by_subj=subjects.DEAD_WILDCARD
        )
        return oldest is not None and oldest.sequence < end


@dataclass(frozen=True)
class _Listed:
    """What is kept of a letter for a list: its request is dropped as soon as it is read."""

    sequence: int
    size: int
    head: DeadLetterHead

    @classmethod
    def of(cls, stored: StoredMessage) -> Self:
        head = decode_dead_letter_head.read(stored.data, stored.subject)
        if head is None or not _is_of(head, stored.subject):
            head = DeadLetterHead.of(_read(stored))
        return cls(stored.sequence, len(stored.data), head)


def _is_of(letter: DeadLetter | DeadLetterHead, subject: str) -> bool:
    return subject == subjects.dead(letter.model, letter.id)


def _read(stored: StoredMessage) -> DeadLetter:
    """The letter; if it cannot be read, a letter that says so."""
    _, _, model, job_id = stored.subject.split(".")
    try:
        letter = decode_dead_letter(stored.data)
        if not _is_of(letter, stored.subject):
            raise Unreadable("it is that of another job")
        return letter
    except Unreadable as error:
        return DeadLetter(
            id=job_id,
            model=model,
            code="unreadable_letter",
            message=f"what is stored as the dead letter cannot be read: {error}",
            attempts=0,
            at=timestamp(parse_timestamp(stored.time)),
            request=stored.data.decode("utf-8", "replace"),
        )


def _resubmission(letter: DeadLetter) -> Resubmission:
    try:
        request: InferenceRequest = decode_request(letter.request).with_said_sampling()
    except Unreadable as error:
        raise CannotRetry(
            f"the dead letter of {letter.id} does not hold the complete request ({error}); submit "
            "it again yourself, then drop the letter"
        ) from None
    same = {
        name: getattr(request, name)
        for name in Resubmission.__struct_fields__
        if hasattr(request, name)
    }
    timeout_s = letter.timeout_s
    if timeout_s is not None and not 0 < timeout_s <= MAX_JOB_LIFETIME.total_seconds():
        timeout_s = None  # put there by hand
    from_letter = {"model": letter.model, "priority": letter.priority, "timeout_s": timeout_s}
    return Resubmission(**{**same, **from_letter, "retry_of": letter.id})
