"""The models in the cache of the Hugging Face hub's library, which other programs share.

Read here, without the library's own functions, which fail as a whole if one repository is damaged.
"""

import re
from pathlib import Path

from msgspec import Struct

from shared.gguf_files import group_models
from shared.hub.name import PREFIX, HubName

_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


class CachedModel(Struct, frozen=True):
    """A model of ``repo`` whose files are all there."""

    repo: str
    folder: Path
    files: list[str]
    """Relative to ``folder``, a revision; the parts of a split model in order."""

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.repo}/{self.files[0]}"

    @property
    def paths(self) -> list[Path]:
        return [self.folder / file for file in self.files]


def cache_folder() -> Path:
    """Where the library keeps its cache (``HF_HUB_CACHE``, ``HF_HOME``).

    Raises:
        ImportError: the library is not installed.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(repo: str) -> Path:
    """The part of the cache that belongs to ``repo``.

    Raises:
        ImportError: the library is not installed.
    """
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached_models(repo: str | None = None) -> list[CachedModel]:
    """Those of ``repo``, or all, in the order of their names.

    Raises:
        ImportError: the library is not installed.
    """
    if repo is not None:
        return _models(repo, repository_folder(repo))
    try:
        folders = sorted(cache_folder().iterdir())
    except OSError:
        return []
    found = []
    for folder in folders:
        if match := _FOLDER.fullmatch(folder.name):
            found += _models(f"{match['owner']}/{match['name']}", folder)
    return found


def find_cached(name: HubName) -> Path | None:
    """The first file of the model, if exactly one in the cache matches.

    Raises:
        ImportError: the library is not installed.
    """
    found = [model for model in cached_models(name.repo) if name.matches(model.files)]
    return found[0].paths[0] if len(found) == 1 else None


def _models(repo: str, folder: Path) -> list[CachedModel]:
    found: dict[str, CachedModel] = {}
    for snapshot in _snapshots(folder):
        files = [
            path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if _is_file(path)
        ]
        for names in group_models(files):
            found.setdefault(names[0], CachedModel(repo, snapshot, names))
    return [found[name] for name in sorted(found)]


def _snapshots(folder: Path) -> list[Path]:
    """The revisions of which something was downloaded, the last known one of the branch ``main``
    first, then the newest: a file that was downloaded earlier is only in that of its time."""
    try:
        main = (folder / "refs" / "main").read_text("utf-8", "replace").strip()
    except OSError:
        main = ""
    try:
        snapshots = [(path, path.stat().st_mtime) for path in (folder / "snapshots").iterdir()]
    except OSError:
        return []
    snapshots.sort(key=lambda one: (one[0].name == main, one[1]), reverse=True)
    return [path for path, _ in snapshots]


def _is_file(path: Path) -> bool:
    """False for a link to a file that was deleted, or that must not be read."""
    try:
        return path.is_file()
    except OSError:
        return False
