"""GGUF files by their names: one model is one file, or all parts of a split one."""

import re
from collections.abc import Iterable

EXTENSION = ".gguf"

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.I | re.S)
"""How llama.cpp names the parts; it finds the others by the name of the first."""

MAX_PARTS = 1000


def group_models(names: Iterable[str]) -> list[list[str]]:
    """The files of each model among ``names``, sorted; the parts of a split one in order. A model
    of which a part is missing is left out, and so is what is not a GGUF by its name."""
    models: list[list[str]] = []
    split: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(set(names)):
        if not name.lower().endswith(EXTENSION):
            continue
        part = _PART.fullmatch(name)
        if part is None:
            models.append([name])
        else:
            key = part["stem"], int(part["count"])
            split.setdefault(key, {})[int(part["number"])] = name
    for (_, count), parts in split.items():
        # Compared first, because names may promise any number of parts.
        if len(parts) == count <= MAX_PARTS and sorted(parts) == list(range(1, count + 1)):
            models.append([parts[number] for number in sorted(parts)])
    return sorted(models)
