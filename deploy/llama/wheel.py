#!/usr/bin/env python3
"""Compile llama-cpp-python with Sluice's recipe, once per machine, and print the wheel's path.

`make .venv` and the Containerfile call it. Wheels are kept in `$XDG_CACHE_HOME/sluice/wheels`
(`~/.cache`) under a key of everything that affects the result, so that another compiler, other
flags or another CPU get their own. pip's cache is never used. `CMAKE_ARGS`, `CC`, `CXX` and the
compiler flags of the environment are respected.

It uses only the standard library, because it runs before there is an environment.
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
"""The files that determine how it is compiled."""

VARIABLES = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX")


class CannotCompile(Exception):
    """The message is for the person who runs this."""


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
    """The wheel of the version in ``constraints``, compiled if it is not in the cache.

    Raises:
        CannotCompile: no compiler, no version, no writable cache, or the compilation failed.
    """
    version = pinned_version(constraints)
    folder = cache() / key(version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CannotCompile(
            f"cannot write {folder} ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds the wheel
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
    """The key of the wheel that would be compiled; it differs whenever the result may differ."""
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
    """The C++ compiler's version, and the macros that it defines for this CPU."""
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
    """Compile into ``folder``. The wheel is moved there by a rename, so that it is complete."""
    print("compiling llama.cpp; this takes a few minutes, once", file=sys.stderr, flush=True)
    # Also for the build tools, for which newer versions of pip have a separate variable.
    pins = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            # Neither pip's cache nor a folder of wheels, which may have been compiled differently.
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
