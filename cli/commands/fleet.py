"""``sluice queue``, ``inferers``, ``concurrency`` and ``top``."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from cli.client import Client
from cli.exit_status import EXIT_FAILED
from cli.interrupts import interrupted_by_signals
from cli.options import DEFAULT_URL, Json, Url
from cli.output import out, print_changes, print_inferers, print_json, print_queue
from cli.top import render, take_snapshot, watch
from shared.timestamps import timestamp
from shared.wire.api import ConcurrencyRequest

TOP_TIMEOUT_S = 3.0
"""Short, because a live view that waits longer shows outdated values."""


def queue(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show the queue of each model."""
    with Client(url) as client:
        report = client.queue()
    print_json(report) if as_json else print_queue(report.models)


def inferers(url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show the live inferers and their jobs."""
    with Client(url) as client:
        report = client.inferers()
    print_json(report) if as_json else print_inferers(report.inferers, report.at or timestamp())


def top(
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Watch queues, inferers and running jobs until Ctrl-C. Prints once if stdout is not a
    terminal."""
    with Client(url, timeout_s=TOP_TIMEOUT_S) as client, interrupted_by_signals():
        if as_json:
            print_json(take_snapshot(client))
        elif once or not sys.stdout.isatty() or out.is_dumb_terminal:
            out.print(render(take_snapshot(client)))
        else:
            with suppress(KeyboardInterrupt):
                watch(client)


def concurrency(
    slots: Annotated[int, typer.Argument(min=0, max=64, help="Jobs at once; 0 for none.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Only inferers of this model.")
    ] = None,
    inferer: Annotated[str | None, typer.Option("--inferer", help="Only this inferer.")] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Set how many jobs an inferer runs at once, without a restart. Running jobs continue.

    After a restart the inferer uses INFERER_CONCURRENCY again."""
    wanted = ConcurrencyRequest(concurrency=slots, model=model, inferer=inferer)
    with Client(url) as client:
        report = client.set_concurrency(wanted)
    print_json(report) if as_json else print_changes(report.inferers)
    if any(change.refused for change in report.inferers):
        raise typer.Exit(EXIT_FAILED)
