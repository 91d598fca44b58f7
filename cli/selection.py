"""Options and reports of commands that select jobs or dead letters by ids or filters."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from cli.exit_status import EXIT_FAILED, EXIT_USAGE, CommandError
from cli.output import print_error, print_json, print_text
from shared.timestamps import timestamp
from shared.wire.listing import BulkReport
from shared.wire.requests import Priority

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_AGO = re.compile(r"([0-9]{1,6})([smhd])")

TIME = "an RFC 3339 time, or how long ago: 30s, 15m, 2h, 1d"

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID")]
State = Annotated[
    str | None,
    typer.Option(
        "--state",
        help="PENDING, STARTED, RETRY, SUCCESS, FAILURE or REVOKED; separate several by commas.",
    ),
]
ModelFilter = Annotated[str | None, typer.Option("--model", "-m")]
Code = Annotated[str | None, typer.Option("--code", help="The error code, such as model_error.")]
PriorityFilter = Annotated[Priority | None, typer.Option("--priority")]
Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", help="NAME=VALUE; if repeated, all must match.")
]
Since = Annotated[str | None, typer.Option("--since", help=f"Accepted since: {TIME}.")]
Until = Annotated[str | None, typer.Option("--until", help=f"Accepted before: {TIME}.")]
FailedSince = Annotated[str | None, typer.Option("--since", help=f"Failed since: {TIME}.")]
FailedUntil = Annotated[str | None, typer.Option("--until", help=f"Failed before: {TIME}.")]
AtMost = Annotated[
    int | None,
    typer.Option(min=1, max=1000, help="Maximum number, the newest first; default: 1000."),
]


def selection(
    ids: list[str] | None, where: dict[str, Any], at_most: int | None = None
) -> dict[str, Any]:
    """The body of a bulk request, with ``ids`` or with the filters in ``where``. A filter that is
    None was not given.

    Raises:
        CommandError: neither ids nor filters are given, or both.
    """
    where = {name: value for name, value in where.items() if value is not None}
    if bool(ids) == bool(where):
        raise CommandError("give either ids, or filters such as --model; see --help", EXIT_USAGE)
    if ids:
        if at_most is not None:
            raise CommandError("--at-most applies only to filters; leave it out", EXIT_USAGE)
        return {"ids": ids}
    return {"where": where} if at_most is None else {"where": where, "at_most": at_most}


def end_with_report(report: BulkReport, done: str, *, as_json: bool) -> None:
    """Print the report. The exit status is 1 if something could not be ``done``."""
    if as_json:
        print_json(report)
    else:
        print_text(f"{done} {report.done} of {report.matched}")
        for one in report.not_done:
            print_error(f"{one.id}: {one.message}")
        if report.left:
            print_text(f"left: at least {report.left}; repeat the command")
    if report.not_done:
        raise typer.Exit(EXIT_FAILED)


def states_of(text: str | None) -> str | None:
    """The states in the gateway's form, separated by commas."""
    return text.upper() if text else None


def metadata_of(pairs: list[str] | None) -> dict[str, str] | None:
    """Raises: CommandError: one of ``pairs`` is not NAME=VALUE, or two have the same name."""
    if not pairs:
        return None
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise CommandError(f"--metadata takes NAME=VALUE, not {pair!r}", EXIT_USAGE)
        if name in found:
            raise CommandError(f"--metadata {name} is given twice; give it once", EXIT_USAGE)
        found[name] = value
    return found


def time_of(text: str | None) -> str | None:
    """A time as it is, or so long ago.

    Raises: CommandError: longer ago than there are dates.
    """
    if text is None or (ago := _AGO.fullmatch(text)) is None:
        return text
    try:
        return timestamp(datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])}))
    except OverflowError:
        raise CommandError(f"{text} ago is before the first date; give less", EXIT_USAGE) from None
