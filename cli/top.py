"""``sluice top``: a live view of queues, inferers and running jobs."""

import time
from datetime import datetime

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from cli.client import Client
from cli.exit_status import EXIT_UNREACHABLE, CommandError
from cli.output import TextConsole, inferers_table, jobs_table, queue_table, safe_text
from shared.timestamps import timestamp
from shared.wire.api import ModelQueue
from shared.wire.inferers import InfererEntry

REFRESH_S = 1.0


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
        inferers_table(snapshot.inferers),
        "",
        jobs_table(snapshot.inferers, snapshot.at or timestamp()),
    )


def _title(url: str) -> Text:
    now = datetime.now().astimezone()
    return Text(f"sluice top, {url}, {now:%H:%M:%S}; Ctrl-C to quit\n", "dim")
