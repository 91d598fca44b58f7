"""Outcomes of self-tests, in the user's cache folder if it can be written."""

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from shared import __version__

MOST_RECORDS = 100

T = TypeVar("T", bound=msgspec.Struct)


def recall(circumstances: list[object], kind: type[T]) -> T | None:
    """What was recorded under the same circumstances by this version of Sluice."""
    try:
        return msgspec.json.decode(_file(circumstances).read_bytes(), type=kind)
    except (OSError, RuntimeError, ValueError):
        return None


def record(circumstances: list[object], found: msgspec.Struct) -> None:
    """Keep ``found``; not kept where files cannot be written, as in many containers."""
    try:
        file = _file(circumstances)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(msgspec.json.encode(found))
        unfinished.replace(file)
        _drop_oldest(file.parent)
    except (OSError, RuntimeError):
        pass


def _file(circumstances: list[object]) -> Path:
    """Raises: RuntimeError: this user has no home."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    digest = hashlib.sha256(msgspec.json.encode([__version__, *circumstances])).hexdigest()
    return Path(folder) / "sluice" / "self-tests" / f"{digest[:32]}.json"


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_RECORDS:]:
        file.unlink(missing_ok=True)
