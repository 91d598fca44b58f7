"""Job ids: UUIDv7, which contain the time at which the job was accepted."""

from datetime import UTC, datetime
from uuid import UUID

from uuid6 import uuid7

from shared.retention import RESULT_RETENTION

_RANDOM_BITS = (1 << 80) - 1
"""The bits of a UUIDv7 below its timestamp."""


def new_job_id(at: datetime | None = None) -> str:
    """A new id with the time ``at``, the broker's time for a job; by default this host's time."""
    made: UUID = uuid7()
    if at is not None:
        made = UUID(int=int(at.timestamp() * 1000) << 80 | made.int & _RANDOM_BITS)
    return str(made)


def is_job_id(text: str) -> bool:
    """Whether ``text`` is a UUIDv7 in canonical form (RFC 9562) with a valid time."""
    try:
        parsed = UUID(text)
        return parsed.version == 7 and str(parsed) == text and accepted_at(text).year > 0
    except (ValueError, OverflowError):
        return False


def accepted_at(job_id: str) -> datetime:
    """The time in the id, to the millisecond."""
    return datetime.fromtimestamp((UUID(job_id).int >> 80) / 1000, UTC)


def has_aged_out(job_id: str, now: datetime) -> bool:
    """Whether the job is so old that its result may have been deleted."""
    return now - accepted_at(job_id) > RESULT_RETENTION
