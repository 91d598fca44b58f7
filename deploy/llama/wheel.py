#!/usr/bin/env python3
"""Compile llama-cpp-python as Sluice wants it, once for this machine; print the wheel's path.

`make .venv` and the Containerfile call it. Wheels are kept in `$XDG_CACHE_HOME/sluice/wheels`
(`~/.cache`) under a key of everything that decides what comes out: a wheel that was compiled in
another way, by another compiler or for another CPU has another key, and what pip keeps in its own
cache is never asked for. `CMAKE_ARGS`, `CC`, `CXX` and compiler flags of the environment count.

Only the standard library: it runs before there is an environment, with any Python from 3.11 on.
"""

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RECIPE = ("recipe.cmake", "amx.h", "amx_probe.c")
"""The files that decide how it is compiled."""

VARIABLES = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX")


class CannotCompile(Exception):
    """One sentence for the person who runs this."""


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: wheel.py CONSTRAINTS_FILE", file=sys.stderr)
        return 2
    try:
        print(wheel(Path(sys.argv[1]).resolve()))
    except CannotCompile as error:
        print(f"wheel.py: {error}", file=sys.stderr)
        return 1
    return 0


def wheel(constraints: Path) -> Path:
    """The wheel of the version that ``constraints`` names, compiled unless it is there already.

    Raises:
        CannotCompile: no compiler, no version, no place to keep it, or the compilation failed.
    """
    version = pinned_version(constraints)
    folder = cache() / key(version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CannotCompile(
            f"cannot write {folder} ({error.strerror}); set XDG_CACHE_HOME to a folder of yours"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds the wheel
        found = next(folder.glob("*.whl"), None)
        return found or compiled(version, constraints, folder)


def pinned_version(constraints: Path) -> str:
    pinned = re.search(r"^llama[-_]cpp[-_]python==(\S+)", constraints.read_text(), re.M | re.I)
    if pinned is None:
        raise CannotCompile(f"{constraints} does not pin llama-cpp-python")
    return pinned[1]


def cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(chosen) / "sluice" / "wheels"


def key(version: str) -> str:
    """Names what would be compiled; differs whenever the result may."""
    digest = hashlib.sha256()
    for name in RECIPE:
        digest.update((FOLDER / name).read_bytes())
    parts = [
        version,
        sys.implementation.cache_tag,
        sysconfig.get_platform(),
        *platform.libc_ver(),
        compiler(),
        *(f"{name}={os.environ.get(name, '')}" for name in VARIABLES),
    ]
    digest.update("\0".join(parts).encode())
    return f"{version}-{digest.hexdigest()[:16]}"


def compiler() -> str:
    """The C++ compiler's version, and all that it takes for granted of this CPU."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    try:
        version = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        raise CannotCompile(
            f"no C++ compiler: {shlex.join(command)} does not run; install one (build-essential)"
        ) from None
    native = subprocess.run(
        [*command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
    )
    return version + native.stdout


def compiled(version: str, constraints: Path, folder: Path) -> Path:
    """Compile into ``folder``. A wheel that is there is complete: it gets there by a rename."""
    print("compiling llama.cpp; this takes some minutes, once", file=sys.stderr, flush=True)
    # For the tools that build it, too; newer versions of pip have a variable of its own for those.
    pins = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            # Neither pip's cache nor a folder of wheels: nobody knows how those were compiled.
            *("--no-cache-dir", "--no-binary", "llama-cpp-python", "--no-deps"),
            *("--config-settings", f"cmake.define.CMAKE_PROJECT_INCLUDE={FOLDER / 'recipe.cmake'}"),
            *("--wheel-dir", work, f"llama-cpp-python=={version}"),
        ]
        if subprocess.run(command, env={**os.environ, **pins}, stdout=sys.stderr).returncode != 0:
            raise CannotCompile("llama.cpp could not be compiled; the reason is above")
        made = next(Path(work).glob("*.whl"))
        kept = folder / made.name
        shutil.move(made, kept)
    return kept


if __name__ == "__main__":
    sys.exit(main())
