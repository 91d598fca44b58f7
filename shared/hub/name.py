"""Names of models on the Hugging Face hub: ``hf:owner/repo``, with a file or a quantization."""

import re

from msgspec import Struct

from shared.errors import ModelError

PREFIX = "hf:"
FORMS = "hf:owner/repo/file.gguf, hf:owner/repo:Q4_K_M or hf:owner/repo"

_FORM = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^/].*\.gguf)|:(?P<quantization>[\w.-]+))?",
    re.ASCII | re.IGNORECASE,
)
_NOT_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
"""GGUF files that belong to a model and are none: a projector for images, statistics."""


class HubName(Struct, frozen=True):
    """Which model of the repository ``repo`` is meant: ``file``, or the one with this
    ``quantization``, or, without both, its only one."""

    repo: str
    """``owner/repo``."""
    file: str = ""
    """Path of a GGUF in the repository; of a split one, any part."""
    quantization: str = ""
    """As it stands in the names of files, ``Q4_K_M``; case does not matter."""

    def matches(self, files: list[str]) -> bool:
        """Whether the model that consists of ``files`` may be meant."""
        if self.file:
            return self.file in files
        if _NOT_A_MODEL.search(files[0].rpartition("/")[2]):
            return False
        # A whole word: Q4_K is not part of Q4_K_M, nor Q4_XS of IQ4_XS.
        word = rf"(?<![a-z0-9]){re.escape(self.quantization)}(?![a-z0-9_])"
        return not self.quantization or bool(re.search(word, files[0], re.IGNORECASE))


def is_hub_name(model: str) -> bool:
    return model.startswith(PREFIX)


def parse_hub_name(model: str) -> HubName:
    """Raises: ModelError: it does not have one of the forms."""
    found = _FORM.fullmatch(model)
    if found is None:
        raise ModelError(f"the model {model!r} is not a name on the Hugging Face hub: give {FORMS}")
    return HubName(found["repo"], found["file"] or "", found["quantization"] or "")
