"""Times on the wire: RFC 3339, UTC, always six decimals, so that they compare as strings."""

from datetime import UTC, datetime


def timestamp(at: datetime | None = None) -> str:
    """``at`` (now, when left out) as ``2026-01-31T12:00:00.000000Z``."""
    return (at or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_timestamp(text: str) -> datetime:
    """The moment ``text`` names; nanoseconds, as the broker writes them, are cut to microseconds.

    Raises:
        ValueError: ``text`` is no RFC 3339 time with a zone.
    """
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"a time without a zone: {text!r}")
    return at


def milliseconds_between(start: str, end: str) -> float:
    return (parse_timestamp(end) - parse_timestamp(start)).total_seconds() * 1000
