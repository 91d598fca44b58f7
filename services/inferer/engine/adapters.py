"""LoRA adapters: small files that change what a model answers, each loaded beside it once."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec

from services.inferer.engine.library import load_library
from services.inferer.engine.native_log import NO_REASON, forget_problems, last_problem
from shared.errors import SettingsError
from shared.wire.inferers import MAX_ADAPTERS
from shared.wire.requests import AdapterName

SUFFIX = ".gguf"
STRING, FLOAT32 = 8, 6
"""Types of a GGUF's fields (`gguf_type`)."""
FIELDS = {
    "general.type": STRING,
    "general.architecture": STRING,
    "adapter.type": STRING,
    "adapter.lora.alpha": FLOAT32,
}
"""What llama.cpp reads. A field of another type would end the process."""
FAILED = "failed to apply lora adapter: "


def adapter_files(folder: Path) -> dict[str, Path]:
    """The adapters in ``folder``, by name: each file ``NAME.gguf``.

    Raises:
        SettingsError: the folder cannot be read or has none, or a name is not valid.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except OSError as error:
        raise _refused(folder, f"cannot be read: {error.strerror}") from None
    if not 0 < len(files) <= MAX_ADAPTERS:
        raise _refused(
            folder, f"has {len(files)} files *{SUFFIX}; give a folder with 1 to {MAX_ADAPTERS}"
        )
    for file in files:
        try:
            msgspec.convert(file.name.removesuffix(SUFFIX), AdapterName)
        except msgspec.ValidationError:
            raise _refused(
                file,
                "its name is not valid: give 1 to 64 letters, digits, dots, hyphens and "
                f"underscores, a letter or digit first, and then {SUFFIX}",
            ) from None
    return {file.name.removesuffix(SUFFIX): file for file in files}


def load_adapters(model: Any, folder: Path) -> dict[str, Any]:
    """Load the adapters in ``folder`` for ``model``, llama.cpp's handle; their handles by name.
    They are freed with the model.

    Raises:
        SettingsError: there are none, or one of the files is not an adapter for this model.
    """
    return {name: _load(model, file) for name, file in adapter_files(folder).items()}


def _load(model: Any, file: Path) -> Any:
    forget_problems()
    with _opened(file) as (library, header):
        for name, kind in FIELDS.items():
            index = library.gguf_find_key(header, name.encode())
            if index >= 0 and library.gguf_get_kv_type(header, index) != kind:
                raise _refused(file, f"has a field of the wrong type, {name}; convert it again")
        if not library.gguf_get_n_tensors(header):
            raise _refused(file, "has no weights; convert it again")
    adapter = llama_cpp.llama_adapter_lora_init(model, bytes(file))
    if not adapter:
        _, _, reason = last_problem().rpartition(FAILED)
        raise _refused(file, f"is not a LoRA adapter for this model: {reason}")
    if llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise _refused(
            file,
            "is an activated LoRA (aLoRA), which is not "
            "supported; give one that applies to all tokens",
        )
    return adapter


class _Options(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@contextmanager
def _opened(file: Path) -> Iterator[tuple[ctypes.CDLL, Any]]:
    """The header of ``file``, as ggml has read it.

    Raises:
        SettingsError: it cannot.
    """
    library = load_library()
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Options]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_find_key.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.gguf_find_key.restype = ctypes.c_int64
    library.gguf_get_kv_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    library.gguf_get_n_tensors.restype = ctypes.c_int64
    library.gguf_free.argtypes = [ctypes.c_void_p]
    header = library.gguf_init_from_file(bytes(file), _Options(True, None))
    if not header:
        reason = last_problem()
        raise _refused(
            file, "is not a GGUF file" if reason == NO_REASON else f"cannot be read: {reason}"
        )
    try:
        yield library, header
    finally:
        library.gguf_free(header)


def _refused(path: Path, why: str) -> SettingsError:
    return SettingsError(f"INFERER_ADAPTERS: {path} {why}")
