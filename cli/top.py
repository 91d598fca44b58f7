"""``sluice top``: a live view of queues, inferers and running jobs."""

import time
from collections.abc import Iterator
from datetime import datetime

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.client import Client
from cli.exit_status import EXIT_UNREACHABLE, CommandError
from cli.output import TextConsole, inferers_table, queue_table, safe_text
from shared.timestamps import milliseconds_between, timestamp
from shared.wire.api import ModelQueue
from shared.wire.inferers import InfererEntry

REFRESH_S = 1.0
BAR_WIDTH = 10


class Snapshot(Struct, frozen=True):
    """The state of one gateway at one moment."""

    queue: list[ModelQueue]
    inferers: list[InfererEntry]
    at: str | None = None
    """The broker's time, for comparison with job times; None from gateways of earlier versions."""


def take_snapshot(client: Client) -> Snapshot:
    """Raises: CommandError."""
    fleet = client.inferers()
    return Snapshot(client.queue().models, fleet.inferers, fleet.at)


def watch(client: Client) -> None:
    """Show one snapshot after another until interrupted, also through outages of the gateway.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
        CommandError: the URL is not that of a gateway.
    """
    # Unlike the console of other commands, this one does not overflow the screen.
    console = TextConsole()
    latest = Group()
    with Live(latest, console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                latest = render(take_snapshot(client))
                parts: list[RenderableType] = [_title(client.url), latest]
            except CommandError as error:
                if error.exit_status != EXIT_UNREACHABLE:
                    raise
                parts = [_title(client.url), safe_text(f"{error}\n", "red"), latest]
            live.update(Group(*parts), refresh=True)
            time.sleep(REFRESH_S)


def render(snapshot: Snapshot) -> Group:
    """The tables of queues, inferers and jobs."""
    return Group(
        queue_table(snapshot.queue),
        "",
        inferers_table(snapshot.inferers, jobs=False),
        "",
        *_jobs(snapshot.inferers, snapshot.at or timestamp()),
    )


def _title(url: str) -> Text:
    now = datetime.now().astimezone()
    return Text(f"sluice top, {url}, {now:%H:%M:%S}; Ctrl-C to quit\n", "dim")


def _jobs(inferers: list[InfererEntry], now: str) -> Iterator[RenderableType]:
    running = [(entry, job) for entry in inferers for job in entry.jobs]
    if not running:
        yield "no running jobs"
        return
    table = Table(box=None, padding=(0, 1, 0, 0))  # fits into 80 columns
    table.add_column("job", no_wrap=True)
    table.add_column("inferer", overflow="fold", min_width=9)
    table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column()  # the bar, the first column to shrink
    table.add_column("tokens", no_wrap=True)
    for entry, job in sorted(running, key=lambda one: one[1].started_at):
        seconds = milliseconds_between(job.started_at, now) / 1000
        bar = ProgressBar(job.max_tokens, job.completion_tokens, width=BAR_WIDTH)
        tokens = f"{job.completion_tokens}/{job.max_tokens}"
        cells = (safe_text(entry.id), str(job.attempt), f"{seconds:.1f} s", bar, tokens)
        table.add_row(safe_text(job.id), *cells)
    yield table
