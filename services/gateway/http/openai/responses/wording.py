"""Errors about a job, with the parameter names of the Responses API."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from services.gateway.http.openai.responses.requests import ResponseRequest
from shared.errors import InvalidRequest

_NAMES = {
    r"messages(\[.*|\..*)?": "input",
    r"max_tokens": "max_output_tokens",
    r"logprobs": "top_logprobs",
    r"response_format(\..*)?": "text.format",
    r"(tools\[\d+\])\.function(.*)": r"\1\2",
}
"""Names of parameters in Sluice's own form, and here."""


@contextmanager
def in_words_of(body: ResponseRequest) -> Iterator[None]:
    """Raises: InvalidRequest: as inside, with the name that the parameter has in ``body``."""
    names = dict(_NAMES)
    if body.chat_template_kwargs is None:
        names["chat_template_kwargs"] = "reasoning.effort"
    try:
        yield
    except InvalidRequest as error:
        param = error.param or ""
        for name, here in names.items():
            if (match := re.fullmatch(name, param)) is not None:
                error.param = match.expand(here)
                message = error.message.replace(param, error.param, 1)
                error.args = (re.sub(r"\bmax_tokens\b", "max_output_tokens", message),)
        raise
