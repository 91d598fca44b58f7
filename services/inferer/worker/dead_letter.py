"""The dead letter of a job: its request, and why nobody will try it again."""

from datetime import datetime

from msgspec.structs import replace

from services.inferer.worker.delivery import Job
from shared.timestamps import parse_timestamp, timestamp
from shared.wire.codecs import encode
from shared.wire.results import DeadLetter, Failed

WORST_ESCAPE = 6
"""Bytes that are no text take up to so many times their room when they are shown."""


def dead_letter(job: Job, failed: Failed, now: datetime, max_bytes: int) -> DeadLetter:
    """``job``'s letter, with no more of the request than ``max_bytes`` have room for."""
    letter = DeadLetter(
        id=job.id,
        model=job.model,
        code=failed.code,
        message=failed.message,
        attempts=failed.attempt,
        at=timestamp(now),
        request=job.message.data.decode("utf-8", "replace"),
        priority=job.priority,
        retry_of=failed.retry_of,
        timeout_s=None
        if job.deadline is None
        else (job.deadline - parse_timestamp(job.queued_at)).total_seconds(),
    )
    if len(encode(letter)) > max_bytes:
        return replace(letter, request=letter.request[: max_bytes // WORST_ESCAPE // 2])
    return letter
