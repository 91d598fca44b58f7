"""Errors about a job, in the words of the Responses API."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import InvalidRequest

_NAMES = {
    r"messages(\[.*|\..*)?": "input",
    r"max_tokens": "max_output_tokens",
    r"response_format(\..*)?": "text.format",
    r"(tools\[\d+\])\.function(.*)": r"\1\2",
}
"""Names of parameters in Sluice's own form, and here."""


@contextmanager
def in_words_of_responses() -> Iterator[None]:
    """Raises: InvalidRequest: as inside, with the name that the parameter has here."""
    try:
        yield
    except InvalidRequest as error:
        param = error.param or ""
        for name, here in _NAMES.items():
            if (match := re.fullmatch(name, param)) is not None:
                renamed = match.expand(here)
                error.args = (error.message.replace(param, renamed, 1),)
                error.param = renamed
        raise
