"""The compiled llama.cpp: its folder, the instruction sets it uses, and those it does not use."""

import ctypes
import os
from pathlib import Path

import llama_cpp

from shared.cpus import cpu_model
from shared.errors import ModelError

INSTRUCTION_SETS = {
    "AVX": "avx",
    "AVX2": "avx2",
    "F16C": "f16c",
    "FMA": "fma",
    "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}
"""Those that affect the speed: llama.cpp's name for each, and the kernel's."""
REPLACED_BY = {"AVX_VNNI": "AVX512_VNNI"}
"""If llama.cpp has the second it does not use the first."""

CPU, GPU, INTEGRATED_GPU = 0, 1, 2
"""Types of devices (`ggml_backend_dev_type`)."""


def library_folder() -> Path:
    """The folder that llama.cpp's libraries were loaded from."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    return Path(override) if override else Path(llama_cpp.__file__).parent / "lib"


def load_backends() -> None:
    """Load the code for this CPU, if llama.cpp was compiled for several kinds (the images).

    By default llama.cpp searches beside the Python interpreter and in the working directory.

    Raises:
        ModelError: llama.cpp has no code for this CPU.
    """
    folder = library_folder()
    library = load_library()
    if library.ggml_backend_reg_count() == 0:
        library.ggml_backend_load_all_from_path(bytes(folder))
    if CPU not in _devices():
        raise ModelError(
            f"llama.cpp in {folder} has no code for this CPU ({cpu_model()}); compile it as "
            "docs/compiling.md says"
        )


def gpus() -> int:
    """How many GPUs llama.cpp uses: integrated ones only if there are no others. After
    `load_backends`."""
    devices = _devices()
    return devices.count(GPU) or devices.count(INTEGRATED_GPU)


def _devices() -> list[int]:
    """The type of each device that llama.cpp has found."""
    library = load_library()
    indices = range(library.ggml_backend_dev_count())
    return [library.ggml_backend_dev_type(library.ggml_backend_dev_get(index)) for index in indices]


def load_library() -> ctypes.CDLL:
    """The functions that llama_cpp does not declare."""
    library = ctypes.CDLL(str(library_folder() / "libllama.so"))  # with its dependencies
    for count in (library.ggml_backend_reg_count, library.ggml_backend_dev_count):
        count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    library.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    library.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    library.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
    return library


def load_cpu_code() -> ctypes.CDLL:
    """The library with the code for this CPU, which may be loaded later than the rest; after
    `load_backends`."""
    library = load_library()
    registry = library.ggml_backend_dev_backend_reg(library.ggml_backend_dev_by_type(CPU))
    address = library.ggml_backend_reg_get_proc_address(registry, b"ggml_threadpool_new")
    found = _Location()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found))
    code = ctypes.CDLL(os.fsdecode(found.file))
    code.ggml_threadpool_new.restype = ctypes.c_void_p
    code.ggml_threadpool_pause.argtypes = [ctypes.c_void_p]
    code.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
    return code


class _Location(ctypes.Structure):
    """`Dl_info`: what `dladdr` knows of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def compiled_for() -> list[str]:
    """The features of the CPU backend, as llama.cpp names them; after `load_backends`."""
    info = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    _, _, features = info.rpartition("CPU : ")
    pairs = (feature.partition("=") for feature in features.split("|"))
    return [name.strip() for name, _, value in pairs if value.strip() == "1"]


def not_compiled_for(features: list[str], flags: frozenset[str]) -> list[str]:
    """The instruction sets among a CPU's ``flags`` that llama.cpp could use if it were compiled for
    them."""
    return [
        name
        for name, flag in INSTRUCTION_SETS.items()
        if flag in flags and name not in features and REPLACED_BY.get(name) not in features
    ]
