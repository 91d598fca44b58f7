"""What OpenAI's official clients say of each attempt of a request: its timeout, and whether it is a
retry. Their headers begin with ``x-stainless-``, as do those of other clients of that generator."""

import math
import time
from collections.abc import Iterator
from typing import Any, Self

from litestar import Request
from msgspec import Struct

RETRY_COUNT = "x-stainless-retry-count"
TIMEOUTS = ("x-stainless-read-timeout", "x-stainless-timeout")
"""In seconds; of the Python client (between two bytes) and of the JavaScript client (until the
head of the response)."""

TOLERANCE_S = 1.0
"""How much shorter the request may seem here: a busy gateway reads it late."""

LEAST_INTERVAL_S = 0.1


class ClientAttempt(Struct, frozen=True):
    """One attempt of a client. What cannot be read of its headers is ignored."""

    began: float
    """When the gateway had read the request, on the monotonic clock."""
    timeout_s: float | None = None
    """None if the client did not say."""
    is_retry: bool = False

    @classmethod
    def of(cls, request: Request[Any, Any, Any]) -> Self:
        """The attempt that ``request`` is. Call this as soon as it has been read."""
        headers = request.headers
        timeouts = _positive(headers.get(name, "") for name in TIMEOUTS)
        retries = _positive((headers.get(RETRY_COUNT, ""),))
        return cls(time.monotonic(), next(timeouts, None), any(retries))

    @property
    def has_timed_out(self) -> bool:
        """Whether a client that disconnects now has reached its timeout, and may try again. One
        that disconnects earlier has given up."""
        return (
            self.timeout_s is not None
            and time.monotonic() - self.began >= self.timeout_s - TOLERANCE_S
        )

    def within(self, seconds: float) -> float:
        """``seconds``, or half of the client's timeout if that is less: how long a stream may be
        silent."""
        if self.timeout_s is None:
            return seconds
        return min(seconds, max(self.timeout_s / 2, LEAST_INTERVAL_S))


def _positive(texts: Iterator[str] | tuple[str, ...]) -> Iterator[float]:
    for text in texts:
        try:
            number = float(text)
        except ValueError:
            continue
        if 0 < number < math.inf:
            yield number
