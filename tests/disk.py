"""A disk that is really full: a small file system of its own, for whoever writes to it."""

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


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A tmpfs of 40 MiB at ``folder`` during the block."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small file system, as root: {mounted.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        # Lazily: a test that has failed may have left a broker on it, which ends with the test.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
