"""What happened to a job, from its events and its status."""

from collections.abc import Iterable
from datetime import timedelta

from msgspec.structs import replace

from shared.timestamps import milliseconds_between, parse_timestamp, timestamp
from shared.wire.api import JobStatus
from shared.wire.events import StateEvent
from shared.wire.listing import TimelineEntry

LOST = "worker_lost"


def timeline_of(
    status: JobStatus, via: str | None, events: Iterable[StateEvent]
) -> tuple[list[TimelineEntry], bool]:
    """The entries in their order, and whether every start of the job is among ``events``."""
    entries = [TimelineEntry(event="accepted", at=status.queued_at, via=via)]
    running: StateEvent | None = None
    begun: set[int] = set()
    for event in events:
        if event.state == "started":
            if running is not None and (event.code is not None or event.attempt > running.attempt):
                entries.append(_lost(running, event if event.code is not None else None))
            elif event.attempt in begun and running is not None:
                continue  # published twice
            running = None if event.code is not None else event
            if running is not None:
                begun.add(event.attempt)
                entries.append(_started(event.at, event.attempt, event.inferer))
            continue
        running = None
        entries.append(
            TimelineEntry(
                event="returned" if event.state == "returned" else "attempt_failed",
                at=event.at,
                attempt=event.attempt,
                inferer=event.inferer,
                code=event.code,
                message=event.message,
            )
        )
    if status.started_at is not None and status.attempts not in begun:
        entries.append(_started(status.started_at, status.attempts, status.inferer))
    is_complete = sum(1 <= attempt <= status.attempts for attempt in begun) == status.attempts
    if status.finished_at is not None:
        error = status.error
        if running is not None and error is not None and error.code == LOST:
            entries.append(_lost(running, None))
        entries += _first_token(status)
        entries.append(
            TimelineEntry(
                event="result",
                at=status.finished_at,
                state=status.state,
                code=error.code if error else None,
                message=error.message if error else None,
            )
        )
    return _with_durations(entries), is_complete


def _started(at: str, attempt: int, inferer: str | None) -> TimelineEntry:
    return TimelineEntry(event="started", at=at, attempt=attempt, inferer=inferer)


def _lost(started: StateEvent, cause: StateEvent | None) -> TimelineEntry:
    return TimelineEntry(
        event="lost",
        attempt=started.attempt,
        inferer=started.inferer,
        code=cause.code if cause else None,
        message=cause.message if cause else None,
    )


def _first_token(status: JobStatus) -> list[TimelineEntry]:
    timings = status.timings
    if status.started_at is None or timings is None or timings.first_token_ms is None:
        return []
    try:
        at = parse_timestamp(status.started_at) + timedelta(milliseconds=timings.first_token_ms)
    except OverflowError:
        return []  # published by hand
    return [TimelineEntry(event="first_token", at=timestamp(at), attempt=status.attempts)]


def _with_durations(entries: list[TimelineEntry]) -> list[TimelineEntry]:
    found, before = [], None
    for entry in entries:
        if entry.at is not None:
            if before is not None:
                after_s = round(milliseconds_between(before, entry.at) / 1000, 3)
                entry = replace(entry, after_s=after_s)
            before = entry.at
        found.append(entry)
    return found
