"""``sluice``: the command line."""

import errno
import sys
from typing import Annotated, NoReturn

import typer

from cli.commands import dead, topology
from cli.commands.bench import bench
from cli.commands.doctor import doctor
from cli.commands.fleet import concurrency, inferers, queue, top
from cli.commands.jobs import ask, cancel, follow, status, submit
from cli.commands.listing import job, jobs
from cli.commands.models import models
from cli.commands.up import up
from cli.exit_status import EXIT_FAILED, CommandError
from cli.output import discard_stdout, print_error
from cli.usage_errors import Commands
from shared import __version__

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a full or broken disk under stdout. Click handles a closed pipe."""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLM inference through a NATS work queue: one request at a time through each worker.",
)
for command in (
    *(up, ask, submit, follow, status, cancel, jobs, job, queue, inferers, top),
    *(concurrency, doctor, models, bench),
):
    app.command()(command)
app.add_typer(dead.app, name="dead")
app.add_typer(topology.app, name="topology")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool,
        # Eager, so that no command is needed with it.
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def run() -> NoReturn:
    """The console script: every error ends with one line and its exit status."""
    try:
        app()
    except CommandError as error:
        print_error(f"sluice: {error}")
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        discard_stdout()
        print_error(f"sluice: the output cannot be written: {error.strerror}")
        sys.exit(EXIT_FAILED)
    sys.exit(0)


if __name__ == "__main__":
    run()
