"""The figures of one comparison, as docs/benchmarks/<name>.json keeps them: table and plot are made
from that file alone. Sluice's environment and that of the peers both read it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

FOLDER = Path(__file__).resolve().parents[2] / "docs/benchmarks"

T = TypeVar("T")


class Row(Struct):
    """One situation."""

    name: str
    figures: dict[str, list[float]]
    """For each subject that has any, one figure a round, all in the order of the rounds."""
    wanted: dict[str, float] = {}
    """For each subject with a goal, the ratio to the baseline that it must reach."""


def row(
    name: str,
    rounds: Mapping[str, Sequence[T]],
    figure: Callable[[T], float | None],
    wanted: dict[str, float] | None = None,
) -> Row:
    """One figure of what each subject measured in each round. Subjects without one are left out."""
    figures: dict[str, list[float]] = {}
    for subject, measured in rounds.items():
        values = [value for one in measured if (value := figure(one)) is not None]
        if values:
            figures[subject] = values
    return Row(name, figures, wanted or {})


class Metric(Struct):
    """What was measured in each situation."""

    name: str
    unit: str
    higher_is_better: bool
    rows: list[Row] = []

    @property
    def better(self) -> str:
        return "more" if self.higher_is_better else "less"


class Machine(Struct):
    """What it ran on."""

    cpu: str
    usable_cpus: int
    features: list[str]
    """Of the CPU, those that llama.cpp was compiled for."""
    memory_gib: float
    kernel: str
    python: str
    load: float
    """Before the run: processes that wanted a CPU, on average over a minute."""


class Comparison(Struct):
    name: str
    """That of its files."""
    title: str
    baseline: str
    """The subject that the others are compared with."""
    measured_at: str
    machine: Machine
    versions: dict[str, str]
    settings: dict[str, str]
    metrics: list[Metric]

    @property
    def subjects(self) -> list[str]:
        """The baseline, then the others in the order in which they were measured."""
        found = dict.fromkeys([self.baseline])
        for metric in self.metrics:
            for row in metric.rows:
                found.update(dict.fromkeys(row.figures))
        return list(found)


def load(path: Path) -> Comparison:
    return msgspec.json.decode(path.read_bytes(), type=Comparison)


def save(comparison: Comparison, folder: Path) -> Path:
    """Returns the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{comparison.name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")
    return path
