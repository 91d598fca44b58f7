"""The dead letter of a job: its request, and why it is not retried."""

from datetime import datetime

from services.inferer.worker.delivery import Job
from shared.timestamps import parse_timestamp, timestamp
from shared.wire.results import DeadLetter, Failed


def dead_letter(job: Job, failed: Failed, now: datetime) -> DeadLetter:
    return DeadLetter(
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
