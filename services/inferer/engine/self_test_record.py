"""Cached results of self-tests, in the user's cache folder if it can be written."""

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from shared import __version__

MAX_RECORDS = 100

T = TypeVar("T", bound=msgspec.Struct)


def load_record(key: list[object], kind: type[T]) -> T | None:
    """The record that this version of Sluice saved under ``key``; None without one."""
    try:
        return msgspec.json.decode(_file(key).read_bytes(), type=kind)
    except (OSError, RuntimeError, ValueError):
        return None


def save_record(key: list[object], record: msgspec.Struct) -> None:
    """Save ``record`` under ``key``, unless files cannot be written, as in many containers."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(file)
        _drop_oldest(file.parent)
    except (OSError, RuntimeError):
        pass


def _file(key: list[object]) -> Path:
    """Raises: RuntimeError: this user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    digest = hashlib.sha256(msgspec.json.encode([__version__, *key])).hexdigest()
    return Path(folder) / "sluice" / "self-tests" / f"{digest[:32]}.json"


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MAX_RECORDS:]:
        file.unlink(missing_ok=True)
