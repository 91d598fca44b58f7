"""How llama.cpp is compiled: right with AMX, and never taken from where nobody knows how."""

import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest

from tests.support.processes import ROOT

RECIPE = ROOT / "deploy" / "llama"
AS_GCC_12 = """
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(void * const *) config))
"""
"""How GCC 12.2 declares it: as if the instruction read 8 bytes."""

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86's")

BACKEND = """
import os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with open(os.environ["BUILDS"], "a") as builds:
        print(config_settings, file=builds)
    name = "llama_cpp_python-9.9-py3-none-any.whl"
    info = "llama_cpp_python-9.9.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("how.txt", os.environ["HOW"])
        wheel.writestr(info + "/METADATA", open("PKG-INFO").read())
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
"""
"""Builds a wheel at once, without a compiler, that says how it was made."""

OLD_PIP = """
import os, sys

if "-C" in sys.argv:
    sys.exit("no such option: -C")
del os.environ["PYTHONPATH"]
os.execv(sys.executable, [sys.executable, "-m", "pip", *sys.argv[1:]])
"""
"""Stands before pip, and knows what Debian 12's knows."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "broken.h").write_text(AS_GCC_12)
    return folder


@on_x86
def test_the_header_makes_gcc_keep_all_64_bytes(probe: Path) -> None:
    """Also where the compiler's own header is wrong; the probe runs without an AMX CPU."""
    assert _run_probe(probe) == 0


@on_x86
def test_the_probe_notices_a_compiler_that_drops_stores(probe: Path) -> None:
    """With the declaration of GCC 12.2 in place of ours, 56 of 64 bytes are never written."""
    assert _run_probe(probe, "-DSLUICE_AMX_H", "-include", str(probe / "broken.h")) != 0


@on_x86
def test_amx_can_be_left_out() -> None:
    """With SLUICE_WITHOUT_AMX llama.cpp's sources see no AMX, whatever they are compiled for."""
    command = ["gcc", "-dM", "-E", "-mamx-tile", "-mamx-int8", "-x", "c", os.devnull]
    header = ["-include", str(RECIPE / "amx.h")]
    assert "__AMX_INT8__" in subprocess.check_output([*command, *header], text=True)
    without = [*command, *header, "-DSLUICE_WITHOUT_AMX"]
    assert "__AMX_" not in subprocess.check_output(without, text=True)


class Source:
    """A folder of packages with a ``llama-cpp-python`` 9.9 that is built at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.constraints = folder / "constraints.txt"
        self.constraints.write_text("llama_cpp_python==9.9\n")
        self.links = folder / "links"
        self.links.mkdir()
        files = {
            "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\n"
            "backend-path = ['.']\n",
            "backend.py": BACKEND,
            "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n",
        }
        with tarfile.open(self.links / "llama_cpp_python-9.9.tar.gz", "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(f"llama_cpp_python-9.9/{name}")
                member.size = len(text)
                archive.addfile(member, BytesIO(text.encode()))

    @property
    def builds(self) -> list[str]:
        file = self.folder / "builds"
        return file.read_text().splitlines() if file.exists() else []

    def environment(self, how: str, **more: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.links),
            "PIP_CACHE_DIR": str(self.folder / "pip-cache"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "BUILDS": str(self.folder / "builds"),
            "HOW": how,
            **more,
        }

    def wheel(self, how: str = "by the recipe", **more: str) -> Path:
        """What wheel.py prints."""
        command = [sys.executable, str(RECIPE / "wheel.py"), str(self.constraints)]
        output = subprocess.check_output(command, env=self.environment(how, **more), text=True)
        return Path(output.strip())

    def pip_wheel(self, how: str) -> Path:
        """What pip gives when it is asked for it without more ado."""
        folder = self.folder / "by-pip"
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
        subprocess.check_call([*command, "llama-cpp-python"], env=self.environment(how))
        return next(folder.glob("*.whl"))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_a_wheel_in_pips_cache_is_not_used(source: Source) -> None:
    """pip installs again and again what it once compiled; `make .venv` must not."""
    source.pip_wheel("badly")
    assert _how(source.pip_wheel("well")) == "badly", "pip's cache does what it is known for"
    assert _how(source.wheel()) == "by the recipe"


def test_a_wheel_in_a_folder_of_wheels_is_not_used(source: Source) -> None:
    """Also if pip is configured to search such a folder."""
    made = source.pip_wheel("badly")
    made.rename(source.links / made.name)
    assert _how(source.wheel()) == "by the recipe"


def test_it_is_compiled_once_by_the_recipe(source: Source) -> None:
    """However many ask at once, all get the same wheel; CMake is given the recipe."""
    with ThreadPoolExecutor(3) as threads:
        wheels = set(threads.map(lambda _: source.wheel(), range(3)))
    assert len(wheels) == 1
    (settings,) = source.builds
    assert f"'cmake.define.CMAKE_PROJECT_INCLUDE': '{RECIPE / 'recipe.cmake'}'" in settings


def test_another_compiler_or_other_flags_compile_anew(source: Source) -> None:
    """A wheel is used again only where the same would be compiled; what was there stays."""
    compiler = source.folder / "c++"
    compiler.write_text('#!/bin/sh\necho "c++ 99.0"\n')
    compiler.chmod(0o755)
    ways = [{}, {"CMAKE_ARGS": "-DGGML_CUDA=ON"}, {"CXX": str(compiler)}, {"CXXFLAGS": "-O1"}]
    wheels = [source.wheel(**way) for way in ways]
    assert len(set(wheels)) == len(source.builds) == len(ways)
    assert source.wheel() == wheels[0]
    assert len(source.builds) == len(ways)


def test_debians_pip_is_enough(source: Source) -> None:
    """Debian 12's pip, 23.0, knows ``--config-settings`` by no shorter name."""
    old = source.folder / "old-pip"
    (old / "pip").mkdir(parents=True)
    (old / "pip" / "__init__.py").touch()
    (old / "pip" / "__main__.py").write_text(OLD_PIP)
    assert _how(source.wheel(PYTHONPATH=str(old))) == "by the recipe"
    (settings,) = source.builds
    assert "CMAKE_PROJECT_INCLUDE" in settings


def test_without_a_compiler_the_reason_is_printed(source: Source) -> None:
    """One sentence that says what to install, and no traceback."""
    command = [sys.executable, str(RECIPE / "wheel.py"), str(source.constraints)]
    environment = source.environment("", CXX="no-such-compiler")
    end = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert end.returncode == 1
    assert end.stdout == ""
    assert end.stderr == (
        "wheel.py: no C++ compiler: no-such-compiler does not run; install one (build-essential)\n"
    )


def test_a_compilation_that_fails_leaves_nothing(source: Source) -> None:
    """The next call compiles again instead of finding half a wheel."""
    command = [sys.executable, str(RECIPE / "wheel.py"), str(source.constraints)]
    environment = source.environment("", BUILDS=str(source.folder / "no" / "folder"))
    end = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert end.returncode == 1
    assert "could not be compiled" in end.stderr
    assert _how(source.wheel()) == "by the recipe"


def _run_probe(folder: Path, *options: str) -> int:
    program = folder / "probe"
    command = ["gcc", "-O3", "-mamx-tile", *options, str(RECIPE / "amx_probe.c")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return subprocess.run([program]).returncode


def _how(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("how.txt").decode()
