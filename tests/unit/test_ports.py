"""The ports of parts that start long after their ports were chosen."""

import pytest

from tests.support.processes import first_ephemeral_port, free_port


def test_a_free_port_is_never_given_twice() -> None:
    """Of two parts with one port the second would die, and a third wait for it."""
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == len(ports)


def test_a_free_port_is_below_those_of_outgoing_connections() -> None:
    assert max(free_port() for _ in range(100)) < first_ephemeral_port()


def test_two_test_processes_have_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remainder of a division by the number of workers is the worker's own."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    for worker in range(3):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        assert {free_port() % 3 for _ in range(100)} == {worker}
