"""Which failures are retried, and when: pure functions, the effects are the executor's."""

from datetime import datetime, timedelta
from enum import Enum, auto

RETRIED = {
    "invalid_request": False,
    "prompt_too_long": False,
    "result_too_large": False,
    "model_error": True,
    "out_of_memory": True,
    "internal_error": True,
}
"""The one table. False: the next attempt would end in the same way. A lost worker is not in it:
nobody is there to decide, the lease runs out and the next inferer counts the attempts."""

GROWTH = 4.0
LONGEST_PAUSE_S = 300.0
JITTER = 0.25
"""Jobs that failed together, for the same reason, are not retried together."""


class Final(Enum):
    """How a job ends after its last attempt has failed."""

    FAILED = auto()
    DEAD_LETTERED = auto()
    EXPIRED = auto()
    """Its deadline is before the next attempt."""


def after_failure(
    code: str,
    attempt: int,
    max_attempts: int,
    now: datetime,
    deadline: datetime | None,
    pause_s: float,
) -> datetime | Final:
    """When to start the next attempt at a job, ``pause_s`` after the ``attempt``-th failed with
    ``code``; or how the job ends."""
    if not is_retried(code):
        return Final.FAILED
    if attempt >= max_attempts:
        return Final.DEAD_LETTERED
    again_at = now + timedelta(seconds=pause_s)
    if deadline is not None and again_at >= deadline:
        return Final.EXPIRED
    return again_at


def is_retried(code: str) -> bool:
    """Whether another attempt may cure a failure of this code; an unknown one is final."""
    return RETRIED.get(code, False)


def pause_after(attempt: int, first_s: float, chance: float) -> float:
    """Seconds between the ``attempt``-th, which failed, and the next: about ``first_s`` after the
    first, then four times as long each time, 5 minutes at most. ``chance``, from 0 to 1, spreads
    them by a quarter."""
    grown_s = first_s * GROWTH ** min(attempt - 1, 9)
    return min(grown_s, LONGEST_PAUSE_S) * (1 + JITTER * (2 * chance - 1))
