"""The tables of a comparison, from its JSON.

    .venv/bin/python -m benchmarks.peers.report docs/benchmarks/NAME.json …

writes ``NAME.md`` beside each file.
"""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import arguments
from benchmarks.peers.comparison import Comparison, Metric, Row, load


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args().files:
        path.with_suffix(".md").write_text(report(load(path)))
    return 0


def report(comparison: Comparison) -> str:
    """A page of Markdown."""
    machine = comparison.machine
    facts = [
        f"Measured {comparison.measured_at}: {machine.cpu}, {machine.usable_cpus} usable CPUs, "
        f"{machine.memory_gib:.0f} GiB, Linux {machine.kernel}, Python {machine.python}, load "
        f"before the run {machine.load:.2f}. llama.cpp uses {', '.join(machine.features)}.",
        "",
        "Medians with quartiles. A ratio is that to the figure of "
        f"{comparison.baseline} in the same round; the median of all rounds.",
    ]
    lines = [f"# {comparison.title}", "", *facts, ""]
    for metric in comparison.metrics:
        lines += [*_table(metric, comparison.subjects, comparison.baseline), ""]
    lines += [f"![{comparison.title}]({comparison.name}.svg)", ""]
    for title, entries in (("Settings", comparison.settings), ("Versions", comparison.versions)):
        lines += [f"## {title}", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in entries.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _table(metric: Metric, subjects: list[str], baseline: str) -> Iterator[str]:
    yield f"## {metric.name} ({metric.better} is better)"
    yield ""
    yield f"| | | {metric.unit} | ratio | wanted |"
    yield "| --- " * 5 + "|"
    for row in metric.rows:
        for subject in filter(row.figures.get, subjects):
            ratios = [] if subject == baseline else ratios_to(row, subject, baseline)
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            bound = "at least" if metric.higher_is_better else "at most"
            wanted = f"{bound} {row.wanted[subject]}" if subject in row.wanted else ""
            cells = (row.name, subject, _spread(row.figures[subject]), ratio, wanted)
            yield f"| {' | '.join(cells)} |"


def ratios_to(row: Row, subject: str, baseline: str) -> list[float]:
    """Of each round; none if one of the two has no figures, or the baseline a zero."""
    pairs = zip(row.figures.get(subject, []), row.figures.get(baseline, []), strict=False)
    return [this / that for this, that in pairs if that]


def _spread(figures: list[float]) -> str:
    """``median [lower quartile .. upper quartile]``."""
    middle = statistics.median(figures)
    if len(figures) == 1:
        return _rounded(middle)
    low, _, high = statistics.quantiles(figures, n=4, method="inclusive")
    return f"{_rounded(middle)} [{_rounded(low)} .. {_rounded(high)}]"


def _rounded(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


if __name__ == "__main__":
    sys.exit(main())
