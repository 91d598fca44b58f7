"""The timeline of a job, from its events and its status."""

from datetime import UTC, datetime, timedelta
from typing import Any

from services.gateway.jobs.timeline import timeline_of
from shared.timestamps import timestamp
from shared.wire.api import JobStatus
from shared.wire.events import StateEvent
from shared.wire.results import Completed, Failed, Timings, Usage

BEGINNING = datetime(2026, 1, 31, 12, tzinfo=UTC)


def at(second: float) -> str:
    return timestamp(BEGINNING + timedelta(seconds=second))


def event(state: Any, attempt: int, second: float, inferer: str = "a", **more: Any) -> StateEvent:
    return StateEvent(state=state, attempt=attempt, at=at(second), inferer=inferer, **more)


def status(kind: Any, **fields: Any) -> JobStatus:
    own: dict[Any, dict[str, Any]] = {
        Completed: {
            "text": "",
            "finish_reason": "stop",
            "usage": Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2),
        },
        Failed: {"code": "worker_lost", "message": "lost"},
    }
    shared = {"id": "j", "model": "m", "queued_at": at(0), "inferer": "a", "attempt": 1}
    return JobStatus.of(kind(**{**shared, **own[kind], **fields}))


def shown(*given: Any) -> list[tuple[str, int | None, float | None]]:
    entries, _ = timeline_of(*given)
    return [(entry.event, entry.attempt, entry.after_s) for entry in entries]


def test_a_job_that_ran_once() -> None:
    """Accepted, waited, read its prompt, generated."""
    done = status(
        Completed,
        started_at=at(10),
        finished_at=at(13.5),
        timings=Timings(queued_ms=10_000, first_token_ms=500),
    )
    assert shown(done, "http", [event("started", 1, 10)]) == [
        ("accepted", None, None),
        ("started", 1, 10.0),
        ("first_token", 1, 0.5),
        ("result", None, 3.0),
    ]
    entries, is_complete = timeline_of(done, "http", [event("started", 1, 10)])
    assert is_complete
    assert (entries[0].via, entries[-1].state) == ("http", "SUCCESS")


def test_numbers_and_times_out_of_range() -> None:
    """As somebody may publish them by hand: they take neither memory nor an error."""
    many = status(Failed, attempt=2**53, finished_at=at(1))
    entries, is_complete = timeline_of(many, None, [event("started", 2**53, 1)])
    assert not is_complete
    assert entries[-1].event == "result"
    last = "9999-12-31T23:59:59.000000Z"
    late = status(
        Completed,
        started_at=last,
        finished_at=last,
        timings=Timings(queued_ms=0, first_token_ms=1e12),
    )
    assert [one[0] for one in shown(late, None, [])] == ["accepted", "started", "result"]


def test_a_failure_a_shutdown_and_a_lost_inferer() -> None:
    """Each attempt says how it ended; a lost inferer says nothing, or its parent does."""
    events = [
        event("started", 1, 1),
        event("returned", 1, 2),
        event("started", 1, 3, "b"),
        event("retrying", 1, 4, "b", code="model_error", message="why"),
        event("started", 2, 6),
        event("started", 3, 20, "b"),
        event("started", 3, 21, "b", code="worker_lost", message="killed by SIGSEGV"),
    ]
    lost = status(Failed, attempt=3, finished_at=at(30), started_at=None)
    assert [name for name, _, _ in shown(lost, None, events)] == [
        *("accepted", "started", "returned", "started", "attempt_failed"),
        *("started", "lost", "started", "lost", "result"),
    ]
    entries, is_complete = timeline_of(lost, None, events)
    assert is_complete
    assert (entries[4].code, entries[4].message) == ("model_error", "why")
    assert (entries[6].attempt, entries[6].inferer, entries[6].at) == (2, "a", None)
    assert entries[8].message == "killed by SIGSEGV"


def test_the_last_inferer_is_lost_without_a_word() -> None:
    lost = status(Failed, finished_at=at(30), started_at=at(1))
    assert [name for name, _, _ in shown(lost, None, [event("started", 1, 1)])] == [
        *("accepted", "started", "lost", "result")
    ]


def test_events_that_the_broker_has_deleted_are_said_to_be_missing() -> None:
    """What the status says is there all the same."""
    done = status(Completed, attempt=2, started_at=at(10), finished_at=at(11))
    entries, is_complete = timeline_of(done, None, [])
    assert [entry.event for entry in entries] == ["accepted", "started", "result"]
    assert not is_complete


def test_an_event_that_is_stored_twice_is_shown_once() -> None:
    done = status(Completed, started_at=at(10), finished_at=at(11))
    twice = [event("started", 1, 10), event("started", 1, 10)]
    assert [name for name, _, _ in shown(done, None, twice)] == ["accepted", "started", "result"]
