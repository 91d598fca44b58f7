"""Names of models (``qwen2.5:1.5b``, ``org/name``), and the tokens that stand for them in NATS.

Users see names. Subjects, consumer names and default inferer ids contain a token, which is derived
from the name, so no table of the two is needed.
"""

import re
import unicodedata
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from shared.errors import SettingsError
from shared.hub.name import PREFIX, is_hub_name

MAX_NAME_CHARS = 128
MAX_SLUG_CHARS = 48
DIGEST_CHARS = 8

_TOKEN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

NAME_RULE = (
    f"1 to {MAX_NAME_CHARS} characters, no white space at either end, no control or invisible ones"
)


def is_token(text: str) -> bool:
    """Whether ``text`` has the form of a model's token."""
    return _TOKEN.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether ``text`` is a valid name of a model."""
    return 0 < len(text) <= MAX_NAME_CHARS and text == text.strip() and text.isprintable()


def token_of(name: str) -> str:
    """The token for ``name``: the name itself if it has the form of a token, otherwise its readable
    part and a hash. The token of a token is itself."""
    # Only names are remembered: any client can send megabytes of something else.
    return _token_of(name) if is_name(name) else _token_of.__wrapped__(name)


@lru_cache(1024)
def _token_of(name: str) -> str:
    if is_token(name):
        return name
    # Another machine may compose the same characters differently.
    name = unicodedata.normalize("NFC", name)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:MAX_SLUG_CHARS].strip("-")
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_CHARS]
    return f"{slug or 'model'}-{digest}"


def name_of(token: str, claimed: str | None) -> str:
    """The name of the model with ``token``: ``claimed`` if it has this token, else the token."""
    return claimed if claimed and is_name(claimed) and token_of(claimed) == token else token


def served_name(model: str, wanted: str = "") -> str:
    """The name under which ``model`` is served: ``wanted``, or one derived from the file name. A
    name on the Hugging Face hub is served as it is, without ``hf:``: it must not depend on which
    file it stands for.

    Raises:
        SettingsError: the name is not valid.
    """
    name = wanted or (
        model.removeprefix(PREFIX) if is_hub_name(model) else _from_file_name(Path(model).name)
    )
    if not is_name(name):
        raise SettingsError(f"INFERER_ALIAS={name!r}: give {NAME_RULE}")
    return name


def _from_file_name(name: str) -> str:
    stem = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:64]
