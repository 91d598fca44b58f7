"""Names of models: as users know them (``qwen2.5:1.5b``, ``org/name``), and as subjects hold them.

Users read and write names. A subject, a consumer and an environment variable's default id hold a
token, which is derived from the name and nowhere stored: whoever knows the name knows the token.
"""

import re
import unicodedata
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from shared.errors import SettingsError

LONGEST_NAME = 128
SLUG = 48
DIGEST = 8

_TOKEN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

FORM = f"1 to {LONGEST_NAME} characters, no white space at either end, no control or invisible ones"


def is_token(text: str) -> bool:
    """Whether ``text`` is the token of a model, one part of a subject."""
    return _TOKEN.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether a model may have this name."""
    return 0 < len(text) <= LONGEST_NAME and text == text.strip() and text.isprintable()


@lru_cache(1024)
def token_of(name: str) -> str:
    """The token of the model that is called ``name``: the name itself if it can be one, else its
    readable part and a hash. That of a token is the token."""
    if is_token(name):
        return name
    # The same name may be composed of other characters on another machine.
    name = unicodedata.normalize("NFC", name)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:SLUG].strip("-")
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]
    return f"{slug or 'model'}-{digest}"


def name_of(token: str, claimed: str | None) -> str:
    """What the model of ``token`` is called: ``claimed`` where that is true, else its token."""
    return claimed if claimed and is_name(claimed) and token_of(claimed) == token else token


def served_name(model: str, wanted: str = "") -> str:
    """The name to serve ``model`` under: ``wanted``, or one made from the file's name.

    Raises:
        SettingsError: it is not a name.
    """
    name = wanted or _from_file_name(Path(model).name)
    if not is_name(name):
        raise SettingsError(f"INFERER_ALIAS={name!r}: give {FORM}")
    return name


def _from_file_name(name: str) -> str:
    stem = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:64]
