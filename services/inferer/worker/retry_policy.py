"""Which failures are tried again, and when."""

import random

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
"""Jobs that failed together, of one cause, do not come back together."""


def is_retried(code: str) -> bool:
    """Whether another attempt may cure a failure of this code; an unknown one is final."""
    return RETRIED.get(code, False)


def pause_s(attempt: int, first_s: float) -> float:
    """How long to wait after the ``attempt``-th, which failed: about ``first_s`` after the first,
    then four times as long each time, 5 minutes at most."""
    grown_s = first_s * GROWTH ** min(attempt - 1, 9)
    return min(grown_s, LONGEST_PAUSE_S) * random.uniform(1 - JITTER, 1 + JITTER)
