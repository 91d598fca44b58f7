"""Times on the wire: RFC 3339, UTC, always six decimals, so that they compare as strings.

They are the broker's (`Broker.now`), so that what different hosts wrote can be compared.
"""

from datetime import UTC, datetime

from shared.job_ids import LONGEST_JOB


def timestamp(at: datetime | None = None) -> str:
    """``at`` (now, when left out) as ``2026-01-31T12:00:00.000000Z``."""
    at = (at or datetime.now(UTC)).astimezone(UTC)
    return at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def parse_timestamp(text: str) -> datetime:
    """The moment ``text`` names; nanoseconds, as the broker writes them, are cut to microseconds.

    Raises:
        ValueError: ``text`` is no RFC 3339 time with a zone.
    """
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"a time without a zone: {text!r}")
    try:
        return at.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"a time that there is not: {text!r}") from None


def milliseconds_between(start: str, end: str) -> float:
    """From ``start`` to ``end``, as far as that is possible for a job: never negative, and never
    more than 24 h, whatever somebody wrote."""
    between = (parse_timestamp(end) - parse_timestamp(start)).total_seconds()
    return min(max(between, 0.0), LONGEST_JOB.total_seconds()) * 1000
