"""``sluice dead``: dead letters, the requests that failed for good."""

from typing import Annotated, Any

import typer
from rich.table import Table

from cli.client import Client
from cli.options import DEFAULT_URL, Json, Url
from cli.output import out, print_json, print_text, safe_text
from cli.selection import (
    AtMost,
    Code,
    FailedSince,
    FailedUntil,
    Ids,
    ModelFilter,
    PriorityFilter,
    end_with_report,
    selection,
    time_of,
)
from shared.wire.api import DeadLetterPage
from shared.wire.results import DeadLetter

PAGE = 50

app = typer.Typer(no_args_is_help=True, help="Dead letters: requests that failed for good.")

LetterId = Annotated[str, typer.Argument(metavar="ID")]


@app.callback()
def _group() -> None:
    """Dead letters: requests that failed for good. List, show, retry or drop them."""


@app.command("list")
def list_letters(
    limit: Annotated[
        int, typer.Option(min=1, max=200, help="Maximum number of dead letters.")
    ] = PAGE,
    before: Annotated[
        int | None, typer.Option(min=1, help="`before` of the previous page.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """List dead letters, newest first."""
    with Client(url) as client:
        page = client.dead_letters(limit, before)
    print_json(page) if as_json else _print_page(page)


@app.command()
def show(letter_id: LetterId, url: Url = DEFAULT_URL, as_json: Json = False) -> None:
    """Show a dead letter with the request as it was received."""
    with Client(url) as client:
        letter = client.dead_letter(letter_id)
    print_json(letter) if as_json else _print_letter(letter)


@app.command()
def retry(
    ids: Ids = None,
    code: Code = None,
    model: ModelFilter = None,
    priority: PriorityFilter = None,
    since: FailedSince = None,
    until: FailedUntil = None,
    at_most: AtMost = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Send the requests of dead letters again, selected by ids or filters. The dead letters are
    removed. With a single id, the id of the new job is printed."""
    selected = selection(ids, _where(code, model, priority, since, until), at_most)
    with Client(url) as client:
        if ids and len(ids) == 1:
            accepted = client.retry_dead_letter(ids[0])
            print_json(accepted) if as_json else print_text(accepted.id)
            return
        report = client.bulk("/dead/retry", selected)
    end_with_report(report, "sent again", as_json=as_json)


@app.command()
def drop(
    ids: Ids = None,
    code: Code = None,
    model: ModelFilter = None,
    priority: PriorityFilter = None,
    since: FailedSince = None,
    until: FailedUntil = None,
    at_most: AtMost = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,
) -> None:
    """Delete dead letters, selected by ids or filters."""
    selected = selection(ids, _where(code, model, priority, since, until), at_most)
    with Client(url) as client:
        if ids and len(ids) == 1:
            dropped = client.drop_dead_letter(ids[0])
            print_json(dropped) if as_json else print_text(f"dropped {dropped.id}")
            return
        report = client.bulk("/dead/drop", selected)
    end_with_report(report, "dropped", as_json=as_json)


def _where(
    code: str | None, model: str | None, priority: str | None, since: str | None, until: str | None
) -> dict[str, Any]:
    return {
        "code": code,
        "model": model,
        "priority": priority,
        "since": time_of(since),
        "until": time_of(until),
    }


def _print_page(page: DeadLetterPage) -> None:
    if not page.letters:
        out.print("no dead letters")
        return
    table = Table("id", "model", "at", "attempts", "error", box=None, pad_edge=False)
    for letter in page.letters:
        why = safe_text(f"{letter.code}: {letter.message}")
        table.add_row(
            *map(safe_text, (letter.id, letter.model, letter.at)), str(letter.attempts), why
        )
    out.print(table)
    if page.before is not None:
        out.print(f"next page: sluice dead list --before {page.before}")


def _print_letter(letter: DeadLetter) -> None:
    table = Table.grid(padding=(0, 2))
    for name in ("id", "model", "priority", "attempts", "at"):
        table.add_row(name, safe_text(str(getattr(letter, name))))
    if letter.retry_of is not None:
        table.add_row("retry of", safe_text(letter.retry_of))
    table.add_row("error", safe_text(f"{letter.code}: {letter.message}"))
    out.print(table)
    print_text(letter.request)
