"""Limits the number of connections, and picks the one to close for a new one."""

import resource
from typing import Protocol

RESERVED_DESCRIPTORS = 128
"""File descriptors for everything but HTTP: the broker, logs, and what libraries open."""

RESERVED_CONNECTIONS = 32
"""Above the limit, for health checks only."""


class Evictable(Protocol):
    def evict(self) -> None:
        """Close at once, for a new connection."""


class ConnectionLimit:
    """The connections of one server. At the limit, a new connection replaces the one that has been
    without a complete request for longest. So silent clients cannot use up the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open = 0
        self._incomplete: dict[Evictable, None] = {}
        """Connections without a complete request, those that have been so for longest first."""

    @property
    def is_exhausted(self) -> bool:
        """Whether there is no connection left even for a health check."""
        return self._open > self.limit + RESERVED_CONNECTIONS

    def open(self, connection: Evictable) -> bool:
        """Count a new connection. Returns whether it is within the limit, not a reserved one."""
        self._open += 1
        is_admitted = self._open <= self.limit
        if not is_admitted and self._incomplete:
            oldest = next(iter(self._incomplete))
            del self._incomplete[oldest]
            oldest.evict()
            is_admitted = True
        self.mark_waiting(connection)
        return is_admitted

    def close(self, connection: Evictable) -> None:
        self._open -= 1
        self._incomplete.pop(connection, None)

    def mark_waiting(self, connection: Evictable) -> None:
        """``connection`` has no complete request: it is idle, or still sending one."""
        self._incomplete.pop(connection, None)
        self._incomplete[connection] = None

    def mark_busy(self, connection: Evictable) -> None:
        """``connection`` has sent a complete request."""
        self._incomplete.pop(connection, None)


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, as nats-server does. Returns the limit.

    The usual soft limit of 1024 exists for programs that call ``select``.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connection_bound(wanted: int, descriptors: int) -> int:
    """``wanted``, or fewer if ``descriptors`` do not suffice for so many connections."""
    if descriptors == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, descriptors - RESERVED_DESCRIPTORS - RESERVED_CONNECTIONS))
