"""What a gateway knows of a job that it has just taken in."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from shared.wire.api import JobStatus, TaskState
from shared.wire.requests import Priority


@dataclass(frozen=True)
class Ticket:
    """A job that was accepted: the broker holds it, or its result already."""

    id: str
    model: str
    priority: Priority
    queued_at: str
    deadline: datetime | None
    """None where it would have to be looked up."""
    chat: bool
    state: TaskState = "PENDING"
    kept: bool = False
    """Whether it goes on when its client hangs up, who may come back with its key."""
    repeated: bool = False
    """Whether another submit with the same key came first: inferers answer that one's caller."""

    @classmethod
    def of_repeated(cls, job: JobStatus, chat: bool) -> Self:
        """The ticket of who submits ``job`` once more, with the key of the first time."""
        return cls(
            id=job.id,
            model=job.model,
            priority=job.priority,
            queued_at=job.queued_at,
            deadline=None,
            chat=chat,
            state=job.state,
            kept=True,
            repeated=True,
        )
