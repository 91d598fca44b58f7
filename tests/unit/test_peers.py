"""Benchmarks beside other software: their files, and their tables. The peers are not needed."""

import importlib
from pathlib import Path

import pytest

from benchmarks.measuring import in_turn
from benchmarks.peers.comparison import Comparison, Machine, Metric, load, row, save
from benchmarks.peers.report import report

PEER, OURS = "Peer", "Sluice"


def recorded() -> Comparison:
    """Three rounds of a latency, one of memory that only we have."""
    rounds: dict[str, list[tuple[float, float | None]]] = {
        PEER: [(4.0, None), (2.0, None), (3.0, None)],
        OURS: [(2.0, 7.5), (2.0, 7.0), (2.0, 9.0)],
    }
    latency = Metric("Latency", "ms", False)
    latency.rows.append(row("1 client", rounds, lambda pair: pair[0], {OURS: 0.75}))
    memory = Metric("Memory", "MiB", False)
    memory.rows.append(row("1 client", rounds, lambda pair: pair[1]))
    return Comparison(
        name="example",
        title="Beside a peer",
        baseline=PEER,
        measured_at="2026-01-01T00:00:00Z",
        machine=Machine("A CPU", 2, ["AVX2"], 24.0, "6.1", "3.11.7", 0.05),
        versions={"peer": "1.2.3"},
        settings={"rounds": "3"},
        metrics=[latency, memory],
    )


def test_a_report_has_medians_quartiles_ratios_and_goals(tmp_path: Path) -> None:
    """It is made from the file alone. A ratio is that of a round, not of the medians."""
    lines = report(load(save(recorded(), tmp_path))).splitlines()
    assert "| 1 client | Peer | 3 [2.5 .. 3.5] |  |  |" in lines
    assert "| 1 client | Sluice | 2 [2 .. 2] | 0.67 | at most 0.75 |" in lines
    assert "| 1 client | Sluice | 7.5 [7.25 .. 8.25] |  |  |" in lines
    assert "| peer | 1.2.3 |" in lines
    assert any("A CPU" in line and "2 usable CPUs" in line for line in lines)


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turn({name: lambda name=name: measure(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(order) == "abccba"
    assert found == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}


@pytest.mark.parametrize("name", ["servers", "jobs", "queues", "growth"])
def test_a_comparison_imports_without_the_peers(name: str) -> None:
    """They are in an environment of their own, which the checks do not make."""
    assert callable(importlib.import_module(f"benchmarks.peers.{name}").main)
