"""What a gateway knows of a job that it has just accepted."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from services.gateway.jobs.caller import Caller
from shared.answers.marks import format_of
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.api import JobStatus, TaskState
from shared.wire.inferers import ModelFacts
from shared.wire.requests import ModelRequest, Priority, Task


@dataclass(frozen=True)
class AcceptedJob:
    """A job that was accepted: the broker holds it, or its result already."""

    id: str
    model: str
    priority: Priority
    queued_at: str
    deadline: datetime | None
    """None where it would have to be looked up."""
    task: Task
    caller: Caller
    format: AnswerFormat = PLAIN
    """How the answer is written."""
    state: TaskState = "PENDING"
    survives_disconnect: bool = False
    """Whether it continues when its client disconnects: the client may come back with its key."""
    is_replay: bool = False
    """Whether another submit with the same key came first: the inferer replies to that caller."""

    @classmethod
    def of_replay(cls, job: JobStatus, task: Task, caller: Caller, format: AnswerFormat) -> Self:
        """The job for a client that has submitted ``job`` again with the same key."""
        return cls(
            id=job.id,
            model=job.model,
            priority=job.priority,
            queued_at=job.queued_at,
            deadline=None,
            task=task,
            caller=caller,
            format=format,
            state=job.state,
            survives_disconnect=True,
            is_replay=True,
        )


def format_in(submission: ModelRequest, facts: ModelFacts | None) -> AnswerFormat:
    """How a model with these ``facts`` writes its answer to a request."""
    known = facts.format if facts else None
    return format_of(submission, known or PLAIN)
