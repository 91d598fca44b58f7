"""How much memory a context takes, as llama.cpp reports it, and how much is available."""

import re
from collections.abc import Iterable
from pathlib import Path

import llama_cpp

from services.inferer.engine.native_log import log_lines
from shared.errors import ModelError

MIB = 1024**2
# Lines such as `llama_kv_cache: size =   90.00 MiB (  4096 cells, …` (one for each cache of any
# kind) and `sched_reserve:        CPU compute buffer size =    24.56 MiB`.
BUFFER_SIZE = re.compile(
    r"size = +([0-9.]+) MiB \( *\d+ cells|(?:compute|output) buffer size = +([0-9.]+) MiB"
)


def dry_run(path: Path, contexts: Iterable[llama_cpp.llama_context_params]) -> list[int]:
    """The bytes that each of ``contexts`` of the model at ``path`` would take. None is allocated.

    Caches differ by architecture in more ways than a formula could follow, so llama.cpp computes
    the sizes without allocating. It has no function that returns them, but logs them.

    Raises:
        ModelError: llama.cpp cannot create such a context.
    """
    parameters = llama_cpp.llama_model_default_params()
    parameters.no_alloc = True
    parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(bytes(path), parameters)
    if not model:
        raise ModelError(f"llama.cpp cannot compute how much memory the model {path} takes")
    try:
        return [_size(model, context) for context in contexts]
    finally:
        llama_cpp.llama_model_free(model)


def _size(model: object, parameters: llama_cpp.llama_context_params) -> int:
    with log_lines() as lines:
        context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        _, _, reason = (lines or ["llama.cpp: no reason given"])[-1].partition(": ")
        raise ModelError(f"llama.cpp cannot create such a context: {reason}")
    llama_cpp.llama_free(context)
    matches = (match for line in lines if (match := BUFFER_SIZE.search(line)))
    return round(sum(float(match[1] or match[2]) for match in matches) * MIB)


def available_bytes() -> int:
    """What can be allocated without swapping, within the limit of this cgroup (version 2)."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)
