"""Downloads a model from the Hugging Face hub into the cache of the hub's library.

As a program it is the process that `shared/hub/process.py` starts: ``python -m shared.hub.download
NAME`` prints the `Downloaded` as JSON.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.errors import ModelError
from shared.gguf_files import group_models
from shared.hub.cache import cache_folder, cached_models, find_cached, repository_folder
from shared.hub.name import PREFIX, HubName, parse_hub_name
from shared.printable import printable

MOST_LISTED = 30
"""Models of a repository in an error message."""

_ETAG = re.compile(r"[\w-]{1,128}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Downloaded(Struct, frozen=True, omit_defaults=True):
    """The first file of the model, or why there is none."""

    path: str = ""
    error: str = ""


def fetch(model: str) -> Path:
    """The first file of the model ``hf:…``. If the cache has exactly one that matches, it is taken
    without asking the hub; otherwise all its files are downloaded.

    Raises:
        ModelError: what to do, in one line.
    """
    name = parse_hub_name(model)
    try:
        return find_cached(name) or _fetch_from_hub(model, name)
    except ImportError as error:
        raise ModelError(
            f"the model {model} needs a package ({error}): pip install huggingface_hub"
        ) from None


def _fetch_from_hub(model: str, name: HubName) -> Path:
    with _explained(model, name):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import logging

        logging.set_verbosity(logging.ERROR)  # what matters is in the error
        info = HfApi().model_info(name.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        models = group_models(file.rfilename for file in info.siblings or [])
        paths = [_download(name.repo, file) for file in _choose(model, name, models)]
    if len({path.parent for path in paths}) > 1:
        raise ModelError(f"{name.repo} has changed during the download of {model}; start it again")
    return paths[0]


def _choose(model: str, name: HubName, models: list[list[str]]) -> list[str]:
    """The files of the one model that matches.

    Raises:
        ModelError: none or several do; it lists them.
    """
    found = [files for files in models if name.matches(files)]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{name.repo} has {len(found)} models that match {model}; give one of"
    elif models:
        what = f"{name.repo} has nothing that matches {model}; it has"
    else:
        raise ModelError(
            f"{name.repo} has no GGUF file; look for a repository with GGUF files of this model"
        )
    raise ModelError(f"{what} {_listed(name.repo, found or models)}")


def _listed(repo: str, models: list[list[str]]) -> str:
    names = [printable(f"{PREFIX}{repo}/{files[0]}") for files in models[:MOST_LISTED]]
    more = len(models) - len(names)
    return ", ".join(names).replace("\n", " ") + (f" and {more} more" if more else "")


def _download(repo: str, file: str) -> Path:
    """Download ``file`` unless it is there.

    The library alone begins a file again if its process ended in the middle (decision 47). So what
    it has received is kept here under a name of its own, continued, and checked; the library then
    finds the file where it would have put it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(repo, file)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    etag, size = found.etag or "", found.size
    # The hub does not send larger files over plain HTTP.
    if _ETAG.fullmatch(etag) and size is not None and size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
        folder = repository_folder(repo)
        blob = folder / "blobs" / etag
        lock = cache_folder() / ".locks" / folder.name / f"{etag}.lock"  # the library's own
        for parent in (blob.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                received = blob.with_name(f"{etag}.sluice.incomplete")
                if received.exists() and received.stat().st_size > size:
                    received.unlink()
                with received.open("ab") as output:
                    http_get(
                        url,
                        output,
                        resume_size=output.tell(),
                        # Compressed, it could not be continued.
                        headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                        expected_size=size,
                        displayed_filename=file,
                    )
                _check(received, etag, f"{PREFIX}{repo}/{file}")
                received.rename(blob)
    return Path(hf_hub_download(repo, file))


def _check(received: Path, etag: str, name: str) -> None:
    """The ETag of a large file is its hash; a part that was received earlier may be damaged.

    Raises:
        ModelError: it is; the file is deleted.
    """
    if not _SHA256.fullmatch(etag):
        return
    with received.open("rb") as file:
        is_whole = hashlib.file_digest(file, "sha256").hexdigest() == etag
    if not is_whole:
        received.unlink()
        raise ModelError(f"the download of {name} was damaged and has been deleted; start again")


@contextmanager
def _explained(model: str, name: HubName) -> Iterator[None]:
    """Turns what the library raises into one line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except (ModelError, ImportError):
        raise
    except errors.HFValidationError as error:
        raise ModelError(f"the model {model}: {_line(error)}") from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(
            f"the model {model} is not on this machine, and HF_HUB_OFFLINE is set: unset it, or "
            f"give the path of a GGUF file{_alternatives(name)}"
        ) from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{name.repo} is gated: accept its conditions on {constants.ENDPOINT}/{name.repo}, and "
            "set HF_TOKEN to a token of that account"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            raise ModelError(
                f"{name.repo} does not exist on {constants.ENDPOINT}, or is private: check the "
                "name, or set HF_TOKEN to a token that may read it"
            ) from None
        raise ModelError(
            f"the model {model} cannot be downloaded: {constants.ENDPOINT} answers {status}; try "
            "again later, or give the path of a GGUF file"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ModelError(
                f"the model {model} cannot be stored in {cache_folder()}: {error.strerror}; "
                "HF_HOME names another folder"
            ) from None
        # No network, a proxy's page in place of the hub's answer, or a connection that broke off.
        raise ModelError(
            f"the model {model} is not on this machine, and cannot be downloaded from "
            f"{constants.ENDPOINT} ({type(error).__name__}: {_line(error)}): connect to the "
            f"network, check HF_ENDPOINT, or give the path of a GGUF file{_alternatives(name)}"
        ) from None


def _alternatives(name: HubName) -> str:
    """What the cache has of the repository, for the end of a sentence."""
    models = [model.files for model in cached_models(name.repo)]
    return f"; on this machine there is {_listed(name.repo, models)}" if models else ""


def _line(error: Exception) -> str:
    """The first line of its text."""
    return printable(next(iter(str(error).strip().splitlines()), ""))


def main() -> None:
    try:
        downloaded = Downloaded(path=str(fetch(sys.argv[1])))
    except ModelError as error:
        downloaded = Downloaded(error=error.message)
    print(msgspec.json.encode(downloaded).decode())


if __name__ == "__main__":
    main()
