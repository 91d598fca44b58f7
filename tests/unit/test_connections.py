"""Which connection makes room for another."""

from services.gateway.http.connection_limit import (
    RESERVED_CONNECTIONS,
    ConnectionLimit,
    connection_bound,
)


class Connection:
    def __init__(self, all_of_them: ConnectionLimit) -> None:
        self.all = all_of_them
        self.is_evicted = False
        self.has_place = all_of_them.open(self)

    def evict(self) -> None:
        self.is_evicted = True
        self.all.close(self)


def test_the_longest_idle_connection_makes_room() -> None:
    """One that is busy stays, however old it is."""
    connections = ConnectionLimit(3)
    busy, old, new = (Connection(connections) for _ in range(3))
    connections.mark_busy(busy)
    connections.mark_waiting(old)  # after an answer: it is now the younger one
    another = Connection(connections)
    assert another.has_place
    assert [one.is_evicted for one in (busy, old, new)] == [False, False, True]


def test_while_all_are_busy_some_places_are_kept() -> None:
    """For health checks; what comes after those has none."""
    connections = ConnectionLimit(3)
    for _ in range(3):
        connections.mark_busy(Connection(connections))
    for _ in range(RESERVED_CONNECTIONS):
        reserved = Connection(connections)
        connections.mark_busy(reserved)
        assert not reserved.has_place
        assert not connections.is_exhausted
    Connection(connections)
    assert connections.is_exhausted


def test_the_bound_leaves_descriptors_for_the_rest() -> None:
    """Of 1024 files some are for the broker and for health checks; without a limit none matters."""
    assert connection_bound(10_000, 1024) == 864
    assert connection_bound(100, 1024) == 100
    assert connection_bound(10_000, -1) == 10_000
    assert connection_bound(10_000, 10) == 1
