"""``sluice bench``: how fast a model is on this machine, and which setting suits it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.bench.chart import check_file, draw
from cli.bench.measurement import Measurement
from cli.bench.report import make_report, print_report
from cli.exit_status import EXIT_INTERRUPTED, EXIT_USAGE, CommandError
from cli.interrupts import interrupted_by_signals
from cli.options import MODEL_HELP, Json
from cli.output import print_json, progress_line
from shared.errors import ModelError
from shared.model_files import locate

DEFAULT_S, MOST_S = 105, 3600


def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            envvar="INFERER_MODEL",
            help=MODEL_HELP,
        ),
    ] = "smollm2",
    seconds: Annotated[
        float, typer.Option(help="How long to measure; loading the model takes extra time.")
    ] = DEFAULT_S,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw a chart, FILE.svg or FILE.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a model is on this machine with 1, 2, 4 and 8 slots and in two processes,
    and recommend a setting.

    Needs an idle machine. Reads INFERER_* as an inferer does, except for INFERER_CONCURRENCY."""
    if not 1 <= seconds <= MOST_S:  # also refuses NaN
        raise CommandError(f"--seconds {seconds:g}: give a number from 1 to {MOST_S}", EXIT_USAGE)
    if plot is not None:
        check_file(plot)
    try:
        with interrupted_by_signals():
            file = locate(model).absolute()
    except ModelError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    load = os.getloadavg()[0]
    try:
        with interrupted_by_signals(), _progress() as progress:
            measured = Measurement(file, seconds).run(progress)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report = make_report(file, measured, load)
    print_json(report) if as_json else print_report(report)
    if plot is not None:
        draw(plot, report.title, report.machine, report.settings)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line on stderr, if that is a terminal, with what is measured; see `Measurement.run`."""
    progress = progress_line()
    task = progress.add_task("")

    def show(setting: str, number: int, count: int) -> None:
        progress.update(task, description=setting, completed=number - 1, total=count)

    with progress:
        yield show
