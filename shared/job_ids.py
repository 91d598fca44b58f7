"""Job ids: UUIDv7, so that an id alone says when its job was accepted."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from uuid6 import uuid7

# How long results and events stay readable. Longer than any job may live (24 h), so that a job
# can never start again after its first result has aged out.
RETENTION = timedelta(hours=48)
LONGEST_JOB = timedelta(hours=24)

_BELOW_THE_TIME = (1 << 80) - 1
"""The bits of a UUIDv7 that are not its time, which comes first."""


def new_job_id(at: datetime | None = None) -> str:
    """A new id that says ``at``: the broker's time for a job, this host's where it is left out."""
    made: UUID = uuid7()
    if at is not None:
        made = UUID(int=int(at.timestamp() * 1000) << 80 | made.int & _BELOW_THE_TIME)
    return str(made)


def is_job_id(text: str) -> bool:
    """Whether ``text`` is a UUIDv7 in its canonical form (RFC 9562), of a time there can be."""
    try:
        parsed = UUID(text)
        return parsed.version == 7 and str(parsed) == text and accepted_at(text).year > 0
    except (ValueError, OverflowError):
        return False


def accepted_at(job_id: str) -> datetime:
    """When the id was made, to the millisecond."""
    return datetime.fromtimestamp((UUID(job_id).int >> 80) / 1000, UTC)


def has_aged_out(job_id: str, now: datetime) -> bool:
    """Whether everything about the job may be gone because of its age alone."""
    return now - accepted_at(job_id) > RETENTION
