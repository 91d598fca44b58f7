"""The plot of a comparison, from its JSON, in the environment of the peers.

    .venv/peers/bin/python -m benchmarks.peers.plot docs/benchmarks/NAME.json …

writes ``NAME.svg`` and ``NAME.png`` beside each file: a panel for each metric, a bar for each
subject in each situation with its median, and a line from quartile to quartile.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy

from benchmarks.peers.comparison import Comparison, Metric, load

matplotlib.use("agg")
# Files that differ only where the figures do.
matplotlib.rcParams.update({"svg.hashsalt": "sluice", "font.size": 9})

from matplotlib import pyplot  # noqa: E402

PANEL = (7.0, 3.0)
"""Inches."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().files:
        figure = plot(load(path))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
        pyplot.close(figure)
    return 0


def plot(comparison: Comparison) -> Any:
    width, height = PANEL
    count = len(comparison.metrics)
    figure, panels = pyplot.subplots(
        count, 1, figsize=(width, height * count), layout="constrained", squeeze=False
    )
    figure.suptitle(comparison.title)
    for panel, metric in zip(panels[:, 0], comparison.metrics, strict=True):
        _draw(panel, metric, comparison.subjects)
    handles: dict[str, Any] = {}
    for panel in panels[:, 0]:
        bars, names = panel.get_legend_handles_labels()
        handles |= dict(zip(names, bars, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def _draw(panel: Any, metric: Metric, subjects: list[str]) -> None:
    present = [name for name in subjects if any(name in row.figures for row in metric.rows)]
    places = numpy.arange(len(metric.rows))
    width = 0.8 / len(present)
    for number, name in enumerate(present):
        # Of the situations in which it was measured; each subject has one colour in all panels.
        found = [
            (place, *numpy.quantile(row.figures[name], (0.25, 0.5, 0.75)))
            for place, row in zip(places, metric.rows, strict=True)
            if row.figures.get(name)
        ]
        at, low, middle, high = (numpy.array(column) for column in zip(*found, strict=True))
        panel.bar(
            at + (number - (len(present) - 1) / 2) * width,
            middle,
            width,
            yerr=(middle - low, high - middle),
            label=name,
            color=f"C{subjects.index(name)}",
            error_kw={"elinewidth": 1},
        )
    panel.set_xticks(places, [row.name for row in metric.rows])
    panel.set_title(f"{metric.name} ({metric.better} is better)", fontsize="medium")
    panel.set_ylabel(metric.unit)


if __name__ == "__main__":
    sys.exit(main())
