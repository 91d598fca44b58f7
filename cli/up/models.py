"""The models of `sluice up`, as its option ``--model`` names them."""

import os
from pathlib import Path

from msgspec import Struct

from cli.exit_status import EXIT_USAGE, CommandError
from shared.errors import ModelError, SettingsError
from shared.hub.name import is_hub_name, parse_hub_name
from shared.model_files import locate
from shared.model_names import NAME_RULE, is_name, served_name, token_of


class StackModel(Struct, frozen=True):
    name: str
    """Which clients put into ``model``."""
    model: str
    """A path, the name of a bundled model, or one on the hub."""


def parse_models(options: list[str]) -> list[StackModel]:
    """The models for the values of ``--model``, ``MODEL`` or ``NAME=MODEL``, each with a name of
    its own. Files are checked; a name on the hub is only parsed.

    Raises:
        CommandError: a model cannot be used, or two have the same name.
    """
    if len(options) > 1 and os.environ.get("INFERER_ALIAS"):
        raise CommandError(
            "INFERER_ALIAS names one model, and there are several: unset it, and give "
            "--model NAME=MODEL",
            EXIT_USAGE,
        )
    if len(options) > 1 and os.environ.get("INFERER_ADAPTERS"):
        raise CommandError(
            "INFERER_ADAPTERS cannot be used with several models; unset it, and start the inferers "
            "of that model separately",
            EXIT_USAGE,
        )
    models = [_parse(option) for option in options]
    known: dict[str, StackModel] = {}
    for model in models:
        other = known.setdefault(token_of(model.name), model)
        if other is not model:
            raise CommandError(
                f"--model {other.model} and --model {model.model} would both be served as "
                f"{model.name}: give each a name, --model NAME=MODEL",
                EXIT_USAGE,
            )
    return models


def _parse(option: str) -> StackModel:
    name, equals, model = option.partition("=")
    if not equals or _exists(option):  # a path may contain one
        name, model = "", option
    elif not is_name(name):
        raise CommandError(
            f"--model {option}: {name!r} is not a valid name: give {NAME_RULE}", EXIT_USAGE
        )
    elif not model:
        raise CommandError(f"--model {option}: give NAME=MODEL", EXIT_USAGE)
    try:
        parse_hub_name(model) if is_hub_name(model) else locate(model)
        served = served_name(model, name or os.environ.get("INFERER_ALIAS", ""))
    except (ModelError, SettingsError) as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    return StackModel(served, model)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # not a path
        return False
