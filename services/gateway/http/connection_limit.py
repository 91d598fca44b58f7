"""How many connections there may be, and which one has to make room for another."""

import resource
from typing import Protocol

RESERVED_DESCRIPTORS = 128
"""For everything but HTTP: the broker, logs, and what libraries open for a moment."""

RESERVED_CONNECTIONS = 32
"""Beyond the bound, for health checks alone."""


class Evictable(Protocol):
    def evict(self) -> None:
        """Close at once, to make room for another connection."""


class Connections:
    """The connections of one server. One that has not sent a whole request makes room for a new
    one, the longest such first; so silent clients cannot use up the limit."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._open = 0
        self._waiting: dict[Evictable, None] = {}
        """Idle, silent, or in the middle of a request; in the order in which they began to be."""

    @property
    def is_exhausted(self) -> bool:
        """Whether not even a health check has a place."""
        return self._open > self.bound + RESERVED_CONNECTIONS

    def open(self, connection: Evictable) -> bool:
        """Count a new connection; whether it has a place that is not reserved."""
        self._open += 1
        has_place = self._open <= self.bound
        if not has_place and self._waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.evict()
            has_place = True
        self.waits(connection)
        return has_place

    def close(self, connection: Evictable) -> None:
        self._open -= 1
        self._waiting.pop(connection, None)

    def waits(self, connection: Evictable) -> None:
        """``connection`` has no request from now on, or not a whole one."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def works(self, connection: Evictable) -> None:
        """``connection`` has sent a whole request."""
        self._waiting.pop(connection, None)


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may at all, as nats-server does; how many.

    The usual soft limit of 1024 is there for programs that call ``select``.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connection_bound(wanted: int, descriptors: int) -> int:
    """``wanted`` connections, or as many as ``descriptors`` leave."""
    if descriptors == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, descriptors - RESERVED_DESCRIPTORS - RESERVED_CONNECTIONS))
