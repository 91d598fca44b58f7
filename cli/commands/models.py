"""``sluice models``: the models on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from cli.models.catalogue import read_catalogue
from cli.options import Json
from cli.output import print_json, print_models


def models(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Folders with GGUF files; default: the current one.",
            show_default=False,
        ),
    ] = [Path()],  # noqa: B006  # Typer does not change it
    as_json: Json = False,
) -> None:
    """List the models on this machine, with the name that --model takes: bundled ones, those in the
    cache of the Hugging Face hub, and GGUF files in folders."""
    catalogue = read_catalogue(folders)
    print_json(catalogue) if as_json else print_models(catalogue)
