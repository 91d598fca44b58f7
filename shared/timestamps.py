"""Timestamps on the wire: RFC 3339, UTC, always six decimals, so that they sort as strings.

They are the broker's time (`Broker.now`), so that timestamps of different hosts can be compared.
"""

from datetime import UTC, datetime

from shared.retention import MAX_JOB_LIFETIME

NANOSECONDS = 1_000_000_000
"""In a second; the broker's unit of durations."""


def timestamp(at: datetime | None = None) -> str:
    """``at`` (by default now) as ``2026-01-31T12:00:00.000000Z``."""
    at = (at or datetime.now(UTC)).astimezone(UTC)
    return at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def parse_timestamp(text: str) -> datetime:
    """Parse ``text``. Nanoseconds, which the broker writes, are cut to microseconds.

    Raises:
        ValueError: ``text`` is not an RFC 3339 time with a zone.
    """
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"a time without a zone: {text!r}")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"a time out of range: {text!r}") from None


def milliseconds_between(start: str, end: str) -> float:
    """Milliseconds from ``start`` to ``end``, limited to what is possible for a job: 0 to 24 h."""
    between = (parse_timestamp(end) - parse_timestamp(start)).total_seconds()
    return min(max(between, 0.0), MAX_JOB_LIFETIME.total_seconds()) * 1000
