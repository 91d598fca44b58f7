"""Code for several kinds of CPU, of which one is loaded at the start, as in the images.

Compiling it takes long. Here the library of this environment is taken apart: its code for the CPU
is what one of several files brings, and a stub is in its place.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.inferer.engine.library import compiled_for, library_folder, not_compiled_for
from shared.cpus import cpu_model

STUB = "void *ggml_backend_cpu_reg(void) { return 0; }"
"""No code for a CPU, where libggml.so looks for it."""
VARIANT = r"""
#include <dlfcn.h>
#include <stdlib.h>

int ggml_backend_score(void) { return SCORE; }

void *ggml_backend_init(void) {
    if (SCORE < 2)
        abort();
    return ((void *(*)(void)) dlsym(dlopen(REAL, RTLD_NOW), "ggml_backend_cpu_reg"))();
}
"""
"""Its score is 0 where it does not run."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A library without code for a CPU."""
    for name in ("libllama.so", "libggml.so.0", "libggml-base.so.0"):
        (tmp_path / name).symlink_to(library_folder() / name)
    _compile(STUB, tmp_path / "libggml-cpu.so.0")
    return tmp_path


def test_the_best_that_runs_is_loaded(folder: Path, tiny_model: Path) -> None:
    """From beside the library, whatever the working directory; it computes, and is what is told."""
    for name, score in (("ancient", 1), ("fitting", 2), ("foreign", 0)):
        _compile(VARIANT, folder / f"libggml-cpu-{name}.so", score)
    done = _run(folder, "-m", "services.inferer.engine.self_test", INFERER_MODEL=str(tiny_model))
    assert done.returncode == 0, done.stderr
    program = (
        "from services.inferer.engine.library import compiled_for, load_backends\n"
        "load_backends(); load_backends()\n"
        "print(*compiled_for())"
    )
    assert _run(folder, "-c", program).stdout.split() == compiled_for()


def test_without_a_library_that_runs_the_start_fails_with_a_reason(
    folder: Path, tiny_model: Path
) -> None:
    """One line that names the CPU."""
    _compile(VARIANT, folder / "libggml-cpu-foreign.so", 0)
    done = _run(folder, "-m", "services.inferer.engine.self_test", INFERER_MODEL=str(tiny_model))
    assert done.returncode == 2
    assert done.stderr == (
        f"llama.cpp in {folder} has no code for this CPU ({cpu_model()}); compile it as "
        "docs/compiling.md says\n"
    )


def test_doctor_names_no_missing_feature_that_another_replaces() -> None:
    """Code for Sapphire Rapids leaves out AVX-VNNI, as AVX-512 VNNI takes its place."""
    flags = frozenset({"avx2", "fma", "avx_vnni", "avx512_vnni"})
    assert not_compiled_for(["AVX2", "FMA", "AVX512_VNNI"], flags) == []
    assert not_compiled_for(["AVX2", "FMA"], flags) == ["AVX_VNNI", "AVX512_VNNI"]


def _compile(source: str, library: Path, score: int = 0) -> None:
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-DSCORE={score}", "-o", str(library)]
    real = library_folder() / "libggml-cpu.so.0"
    subprocess.run([*command, f'-DREAL="{real}"'], input=source, text=True, check=True)


def _run(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment, "LLAMA_CPP_LIB_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
