"""Where jobs stand in their queues, by the table of jobs."""

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from typing import Any
from uuid import UUID

from services.gateway.eta.position import QueuedJob
from shared.broker.consumers import ModelConsumers
from shared.timestamps import parse_timestamp
from shared.wire import subjects

PLACE = """
UPDATE jobs SET queue = ?, sequence = ? WHERE id = ? AND result IS NULL
"""
QUEUED = """
SELECT queue, sequence, id, owner, deadline FROM jobs
WHERE queue IS NOT NULL AND state <> 'STARTED'
"""
BETWEEN = """
SELECT count(*) FROM jobs WHERE queue = ? AND sequence > ? AND sequence < ?
"""

Place = tuple[str | None, int, bytes]
"""The queue of a request, None while it is scheduled for a retry; its sequence; the id of its
job."""


class Queues:
    def __init__(self, table: sqlite3.Connection) -> None:
        self._table = table

    def place(self, places: Iterable[Place]) -> None:
        """Note where requests are now: a retry leaves the queue, and comes back at its end."""
        self._table.executemany(PLACE, places)

    def find(self, job_ids: Collection[bytes], models: Iterable[ModelConsumers]) -> list[QueuedJob]:
        """Those of the jobs that are on the queues of ``models`` and do not run."""
        delivered = _delivered(models)
        rows = self._table.execute(
            f"{QUEUED} AND id IN ({', '.join('?' * len(job_ids))}) ORDER BY queue, sequence",
            tuple(job_ids),
        ).fetchall()
        found: list[QueuedJob] = []
        last, counted = "", 0
        for row in rows:
            queue, sequence = row[:2]
            if queue not in delivered:
                continue
            if queue != last:
                last, after, counted = queue, delivered[queue], 0
            between = None
            if sequence > delivered[queue]:
                # Those up to the job before it were counted for that.
                (more,) = self._table.execute(BETWEEN, (queue, after, sequence)).fetchone()
                between, after, counted = counted + more, sequence, counted + more + 1
            found.append(_queued(row, between))
        return found

    def first(self, model: ModelConsumers, limit: int) -> list[QueuedJob]:
        """The first ``limit`` jobs on the queues of ``model`` that do not run, in the order of
        delivery."""
        found: list[QueuedJob] = []
        for queue, delivered in _delivered([model]).items():
            rows = self._table.execute(
                f"{QUEUED} AND queue = ? ORDER BY sequence LIMIT ?", (queue, limit - len(found))
            )
            waiting = count()
            found += [_queued(row, next(waiting) if row[1] > delivered else None) for row in rows]
        return found


def queue_of(request: subjects.RequestSubject) -> str | None:
    """How its queue is named in the table."""
    return None if request.is_scheduled else _queue(request.model, request.priority)


def _queue(model: str, priority: str) -> str:
    return f"{model}.{priority}"


def _delivered(models: Iterable[ModelConsumers]) -> dict[str, int]:
    """The last sequences that were delivered, by their queues, in the order of delivery."""
    return {
        _queue(model.token, priority): model.last_delivered(priority)
        for model in models
        for priority in subjects.PRIORITIES
        if priority in model.by_priority
    }


def _queued(row: Sequence[Any], between: int | None) -> QueuedJob:
    queue, _, key, owner, deadline = row
    model, _, priority = queue.rpartition(".")
    request = subjects.RequestSubject(model, priority, owner, str(UUID(bytes=key)))
    return QueuedJob(request, deadline and parse_timestamp(deadline), between)
