"""``sluice up``: run the whole stack on this machine."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from platformdirs import user_data_path

from cli.options import MODEL_HELP, Json
from cli.output import discard_stdout, print_json
from cli.up.log_format import LogFormat, is_plain
from cli.up.models import parse_models
from cli.up.scale import parse_concurrency, parse_scale
from cli.up.stack import UpOptions, up_until_stopped

DEFAULT_DATA = user_data_path("sluice")


def up(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help=f"{MODEL_HELP} With NAME=, it is served under that name. Can be given several "
            "times: each model has its own inferers.",
        ),
    ] = ["smollm2"],  # noqa: B006  # Typer does not change it
    inferers: Annotated[
        int | None, typer.Option(min=0, help="Number of inferers of each model; default: 1.")
    ] = None,
    minimum: Annotated[
        int | None,
        typer.Option("--min", min=0, help="Inferers of each model to keep when no jobs wait."),
    ] = None,
    maximum: Annotated[
        int | None, typer.Option("--max", min=0, help="Maximum number of inferers of each model.")
    ] = None,
    idle_s: Annotated[
        float, typer.Option(help="Stop inferers above --min after this many idle seconds.")
    ] = 60,
    concurrency: Annotated[
        str,
        typer.Option(
            metavar="1-64|auto",
            help="Jobs at once in each inferer; auto: as many as make a queue move fastest.",
        ),
    ] = "1",
    host: Annotated[
        str, typer.Option(help="Address that the gateway and NATS listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="HTTP port; 0 for any free one.")
    ] = 5001,
    nats_port: Annotated[
        int, typer.Option(min=0, max=65535, help="NATS port; 0 for any free one.")
    ] = 4222,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder for the queue and the results.", show_default="~/.local/share/sluice"
        ),
    ] = DEFAULT_DATA,
    log_format: Annotated[
        LogFormat,
        typer.Option(help="Logs on stderr; auto is plain on a terminal and json elsewhere."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Run the whole stack on this machine until Ctrl-C: NATS, the gateway and inferers. The CPUs
    are divided among all inferers, of all models."""
    options = UpOptions(
        scale=parse_scale(inferers, minimum, maximum, idle_s, len(model)),
        models=parse_models(model),
        concurrency=parse_concurrency(concurrency),
        host=host,
        port=port,
        nats_port=nats_port,
        data=data,
        plain_logs=is_plain(log_format),
    )

    def announce(http_url: str, nats_url: str) -> None:
        try:
            if as_json:
                print_json({"ready": True, "http": http_url, "nats": nats_url})
            else:
                print(f"ready {http_url} {nats_url}", flush=True)
        except OSError:  # the stack goes on without its stdout
            discard_stdout()

    asyncio.run(up_until_stopped(options, announce))
