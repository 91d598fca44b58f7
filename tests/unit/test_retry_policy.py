"""Which failures are retried, and when."""

from datetime import UTC, datetime, timedelta

import pytest

from services.inferer.worker.retry_policy import (
    LONGEST_PAUSE_S,
    Final,
    after_failure,
    is_retried,
    pause_after,
)
from shared.errors import InvalidRequest, ModelError, OutOfMemory, PromptTooLong, SluiceError

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def in_s(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (InvalidRequest, False),
        (PromptTooLong, False),
        (ModelError, True),
        (OutOfMemory, True),
        (SluiceError, True),
    ],
)
def test_what_an_inference_raises_is_in_the_table(error: type[SluiceError], again: bool) -> None:
    """What the request is to blame for ends it; everything else gets another attempt."""
    assert is_retried(error.code) == again


@pytest.mark.parametrize(
    ("code", "attempt", "deadline", "expected"),
    [
        ("model_error", 1, None, in_s(5)),
        ("model_error", 2, in_s(5.001), in_s(5)),
        ("model_error", 2, in_s(5), Final.EXPIRED),
        ("model_error", 1, in_s(-1), Final.EXPIRED),
        ("model_error", 3, None, Final.DEAD_LETTERED),
        ("model_error", 4, in_s(1), Final.DEAD_LETTERED),
        ("invalid_request", 1, None, Final.FAILED),
        ("invalid_request", 3, in_s(1), Final.FAILED),
        ("a code of a later version", 1, None, Final.FAILED),
    ],
)
def test_a_failed_job_is_retried_while_it_has_attempts_and_time(
    code: str, attempt: int, deadline: datetime | None, expected: datetime | Final
) -> None:
    """Of three attempts, with a pause of five seconds. The cause is asked first, then the number of
    attempts, then the deadline: a dead letter is not lost because time ran out as well."""
    assert after_failure(code, attempt, 3, NOW, deadline, pause_s=5) == expected


def test_pauses_grow_to_a_bound_and_differ() -> None:
    """1, 4, 16 seconds, spread by a quarter, never above 5 minutes by more, however many."""
    assert [pause_after(attempt, 1.0, 0.5) for attempt in (1, 2, 3)] == [1, 4, 16]
    assert [pause_after(1, 1.0, chance) for chance in (0.0, 1.0)] == [0.75, 1.25]
    for attempt in (6, 1000):
        assert pause_after(attempt, 1.0, 0.5) == LONGEST_PAUSE_S
        assert pause_after(attempt, 1.0, 1.0) == 1.25 * LONGEST_PAUSE_S
