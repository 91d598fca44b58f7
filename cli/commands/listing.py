"""``sluice jobs`` and ``job``."""

from typing import Annotated

import msgspec
import typer
from rich.table import Table

from cli.client import Client
from cli.options import DEFAULT_URL, JobId, Json, Url
from cli.output import COLOURS, error_line, estimate_line, out, print_json, print_status, safe_text
from cli.selection import (
    Code,
    Metadata,
    ModelFilter,
    PriorityFilter,
    Since,
    State,
    Until,
    metadata_of,
    states_of,
    time_of,
)
from shared.counts import counted
from shared.wire.listing import PAGE, JobDetails, JobPage, ListedJob, TimelineEntry


def jobs(
    state: State = None,
    model: ModelFilter = None,
    code: Code = None,
    priority: PriorityFilter = None,
    inferer: Annotated[
        str | None, typer.Option("--inferer", help="The inferer that ran it last.")
    ] = None,
    via: Annotated[
        str | None, typer.Option("--via", help="http, openai, nats, cli or retry.")
    ] = None,
    metadata: Metadata = None,
    since: Since = None,
    until: Until = None,
    sort: Annotated[
        str | None, typer.Option("--sort", help="accepted, finished, waited, ran or tokens.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Maximum number of jobs.")] = PAGE,
    cursor: Annotated[str | None, typer.Option(help="`cursor` of the previous page.")] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List jobs, newest first: waiting, running, and ended within the last 48 hours."""
    given = {
        "state": states_of(state),
        "model": model,
        "code": code,
        "priority": priority,
        "inferer": inferer,
        "via": via,
        "since": time_of(since),
        "until": time_of(until),
        "sort": sort,
        "limit": str(limit),
        "cursor": cursor,
    }
    query = [(name, value) for name, value in given.items() if value is not None]
    members = metadata_of(metadata) or {}
    query += [(f"metadata.{name}", value) for name, value in members.items()]
    with Client(url) as client:
        page = client.jobs(query)
    print_json(page) if as_json else _print_page(page)


def job(
    job_id: JobId,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Show a job with its request, what happened to it when, and its result."""
    with Client(url) as client:
        found = client.job(client.whole_id(job_id))
    print_json(found) if as_json else _print_details(found)


def _print_page(page: JobPage) -> None:
    if page.jobs:
        table = Table(box=None, pad_edge=False)
        for heading in ("id", "state", "model"):
            table.add_column(heading, no_wrap=heading == "id", overflow="fold")
        for heading in ("waited", "ran", "tokens"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("estimate, error, request", overflow="ellipsis", no_wrap=True)
        for one in page.jobs:
            table.add_row(
                safe_text(one.id),
                safe_text(one.state, COLOURS.get(one.state, "")),
                safe_text(one.model),
                *(_seconds(value) for value in (one.waited_s, one.ran_s)),
                "-" if one.completion_tokens is None else str(one.completion_tokens),
                safe_text(_about(one)),
            )
        out.print(table)
    shown = "" if page.total == len(page.jobs) else f"{len(page.jobs)} of "
    out.print(safe_text(f"{shown}{counted(page.total, 'job')}", "dim"))
    if not page.covers.complete:
        out.print("the gateway has just started and is still reading older jobs")
    if page.cursor is not None:
        out.print(f"next page: sluice jobs … --cursor {page.cursor}")


def _about(job: ListedJob) -> str:
    return ": ".join(part for part in (estimate_line(job), job.code, job.preview) if part)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _print_details(found: JobDetails) -> None:
    table = Table("after", "event", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    for entry in found.timeline:
        table.add_row(_seconds(entry.after_s), safe_text(_sentence(entry)))
    out.print(table)
    if not found.events_complete:
        out.print("(the events of earlier attempts have been deleted)")
    if found.retried_as is not None:
        out.print(safe_text(f"retried as {found.retried_as}"))
    out.print()
    if found.request_from is None:
        out.print("no copy of the request was kept")
    else:
        text = msgspec.json.format(bytes(found.request), indent=2).decode("utf-8", "replace")
        out.print(safe_text(text))
    out.print()
    print_status(found.status)


def _sentence(entry: TimelineEntry) -> str:
    """``started on inferer-1, attempt 2``."""
    words = [entry.event.replace("_", " ")]
    if entry.state is not None:
        words = [entry.state]
    if entry.inferer is not None:
        words.append(f"on {entry.inferer}")
    if entry.attempt is not None:
        words.append(f"(attempt {entry.attempt})")
    if entry.via is not None:
        words.append(f"via {entry.via}")
    line = " ".join(words)
    reason = error_line(entry.code, entry.message)
    return f"{line}: {reason}" if reason else line
