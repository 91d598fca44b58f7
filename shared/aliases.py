"""The name a model is served under: chosen, or made from the name of its file."""

import re
from pathlib import Path

from shared.errors import SettingsError
from shared.subjects import is_model_name


def alias_of(model: str, wanted: str = "") -> str:
    """The name to serve ``model`` under: ``wanted``, or one made from the file's name.

    Raises:
        SettingsError: the name does not fit into a subject.
    """
    alias = wanted or _from_file_name(Path(model).name)
    if not is_model_name(alias):
        raise SettingsError(
            f"INFERER_ALIAS={alias!r}: use 1 to 64 of a-z, 0-9, _ and -, the first no _ or -"
        )
    return alias


def _from_file_name(name: str) -> str:
    stem = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:64]
