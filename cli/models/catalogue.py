"""The models on this machine: bundled ones, those in the cache of the Hugging Face hub, and files
in folders."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from cli.exit_status import EXIT_USAGE, CommandError
from shared.errors import ModelError
from shared.gguf_files import group_models
from shared.gguf_header import MODEL, Header, NotReadable, read_header
from shared.hub.cache import cache_folder, cached_models
from shared.model_files import BUNDLED


class ListedModel(Struct, frozen=True):
    """A model, and what its header says."""

    name: str
    """As ``--model`` takes it."""
    path: str
    """Of its first file."""
    size_bytes: int
    """Of all its files."""
    quantization: str | None = None
    """The type of most weights; null if the file does not say."""
    n_ctx: int | None = None
    """Tokens of context that it was trained for; null if the file does not say."""
    chat: bool = False
    """Whether it has a chat template."""
    problem: str | None = None
    """Why it is not a model that can be used."""


class Catalogue(Struct, frozen=True):
    models: list[ListedModel]
    searched: list[str]
    """The folders."""


def read_catalogue(folders: list[Path]) -> Catalogue:
    """All models that are bundled, cached, or files in ``folders`` (not in folders below).

    Raises:
        CommandError: a folder cannot be read.
    """
    models = [*_bundled(), *_cached(), *(model for one in folders for model in _in_folder(one))]
    searched = [_text(folder.absolute()) for folder in folders]
    with suppress(ImportError):  # without the library, no name on the hub can be used
        searched.insert(0, _text(cache_folder().absolute()))
    return Catalogue(models, searched)


def _bundled() -> Iterator[ListedModel]:
    for name, bundled in BUNDLED.items():
        try:
            yield _listed(name, bundled.parts(), is_cut=True)
        except ModelError:  # it is not installed
            continue


def _cached() -> Iterator[ListedModel]:
    try:
        found = cached_models()
    except ImportError:
        return
    for model in found:
        yield _listed(model.name, model.paths)


def _in_folder(folder: Path) -> Iterator[ListedModel]:
    try:
        expanded = folder.expanduser()
        names = [path.name for path in expanded.iterdir()]
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"the folder {folder} cannot be read: {why}", EXIT_USAGE) from None
    for files in group_models(names):
        yield _listed(str(folder / files[0]), [expanded / file for file in files])


def _listed(name: str, paths: list[Path], *, is_cut: bool = False) -> ListedModel:
    """``is_cut``: the paths are pieces of one GGUF file, not GGUF files themselves."""
    problem, header, size_bytes = None, Header(), 0
    try:
        size_bytes = sum(path.stat().st_size for path in paths)
        header = read_header(paths[0], size_bytes=size_bytes if is_cut else None)
        if header.kind != MODEL:
            problem = f"not a model by itself ({header.kind})"
    except NotReadable as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or "cannot be read"
    return ListedModel(
        _text(name),
        _text(paths[0].absolute()),
        size_bytes,
        header.quantization,
        header.n_ctx,
        header.chat,
        problem,
    )


def _text(path: Path | str) -> str:
    """A path as text: bytes that are not UTF-8 are replaced, as JSON and terminals need it."""
    return os.fsencode(path).decode("utf-8", "replace")
