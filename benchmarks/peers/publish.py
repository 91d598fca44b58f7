"""Keeps a comparison in docs/benchmarks: figures, tables and plot."""

import argparse
import shlex
import subprocess
from pathlib import Path

from benchmarks.measuring import arguments
from benchmarks.peers.comparison import FOLDER, Comparison, Machine, Metric, save
from benchmarks.peers.environment import PYTHON
from benchmarks.peers.report import report
from shared.timestamps import timestamp
from tests.support.processes import ROOT


def comparison_arguments(documentation: str, pairs: int) -> argparse.ArgumentParser:
    """A parser with the options of all comparisons: how many rounds, and where the files go."""
    parser = arguments(documentation)
    parser.add_argument(
        "--pairs", type=int, default=pairs, help=f"rounds, each with every subject ({pairs})"
    )
    parser.add_argument("--to", type=Path, default=FOLDER, help=f"folder for the files ({FOLDER})")
    return parser


def command_line(command: list[str]) -> str:
    """A command without the folders, which are this machine's."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in command)


def publish(
    folder: Path,
    name: str,
    title: str,
    baseline: str,
    metrics: list[Metric],
    machine: Machine,
    versions: dict[str, str],
    settings: dict[str, str],
) -> None:
    """Write ``name`` with .json, .md, .svg and .png to ``folder``, and print the tables."""
    comparison = Comparison(
        name, title, baseline, timestamp(), machine, versions, settings, metrics
    )
    path = save(comparison, folder)
    text = report(comparison)
    path.with_suffix(".md").write_text(text)
    subprocess.run(
        [str(PYTHON), "-m", "benchmarks.peers.plot", str(path.resolve())], cwd=ROOT, check=True
    )
    print(text)
