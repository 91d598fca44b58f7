"""A disk that is really full: a small file system of its own, for the process that writes to it."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE_BYTES = 40 * 1024**2
CHUNK_BYTES = 65_536


class Disk:
    """What is mounted at ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no byte to anybody else."""
        with self._ballast.open("ab", buffering=0) as ballast:
            while shutil.disk_usage(self.folder).free:
                ballast.write(bytes(min(CHUNK_BYTES, shutil.disk_usage(self.folder).free)))

    def relieve(self) -> None:
        self._ballast.unlink()


class CannotMount(Exception):
    """Only root may, and not everywhere."""


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[Disk]:
    """A tmpfs of that size at ``folder`` during the block.

    Raises:
        CannotMount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounting = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounting.returncode:
        raise CannotMount(mounting.stderr.strip())
    try:
        yield Disk(folder)
    finally:
        # Lazily: a test that has failed may have left a broker on it, which ends with the test.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A tmpfs of 40 MiB at ``folder`` during the block, for a test that cannot do without."""
    try:
        with mounted(folder, SIZE_BYTES) as disk:
            yield disk
    except CannotMount as error:
        pytest.skip(f"needs to mount a small file system, as root: {error}")
