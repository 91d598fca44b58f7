"""The header ``Prefer`` (RFC 7240): ``respond-async`` and ``wait``."""

import re
from collections.abc import Iterable, Iterator

from msgspec import Struct

from shared.retention import MAX_JOB_LIFETIME

MAX_WAIT_S = int(MAX_JOB_LIFETIME.total_seconds())
"""The longest possible job; longer waits are cut to it."""

_SPACE = r"[ \t]*"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PAIR = rf"({_TOKEN})(?:{_SPACE}={_SPACE}({_TOKEN}|{_QUOTED}))?"
_PREFERENCE = re.compile(rf"{_PAIR}{_SPACE}(?:;{_SPACE}(?:{_PAIR}{_SPACE})?)*")
_ELEMENT = re.compile(r'(?:"(?:[^"\\]|\\.|\\$)*(?:"|$)|[^,"])+')
"""Up to a comma that is not quoted. A quotation without an end extends to the end."""
_SECONDS = re.compile(r"[0-9]+")


class Preferences(Struct, frozen=True):
    """The preferences of a client. The first valid value of each counts; invalid ones are
    ignored."""

    wait_s: int | None = None
    respond_async: bool = False

    @classmethod
    def parse(cls, headers: Iterable[str]) -> "Preferences":
        """``headers`` are the values of all ``Prefer`` headers, in order."""
        wait_s, respond_async = None, False
        for name, value in _preferences(headers):
            if name == "respond-async":
                respond_async = True
            elif name == "wait" and wait_s is None and _SECONDS.fullmatch(value):
                # The length is compared first, because Python does not parse very long numbers.
                digits = value.lstrip("0") or "0"
                is_longer = len(digits) > len(str(MAX_WAIT_S))
                wait_s = MAX_WAIT_S if is_longer else min(int(digits), MAX_WAIT_S)
        return cls(wait_s, respond_async)

    def applied(self, *, is_finished: bool) -> dict[str, str]:
        """The header ``Preference-Applied``. A response with the result was not asynchronous."""
        applied = ["respond-async"] if self.respond_async and not is_finished else []
        if self.wait_s is not None:
            applied.append(f"wait={self.wait_s}")
        return {"preference-applied": ", ".join(applied)} if applied else {}


def _preferences(headers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names in lower case, and values; parameters are dropped, since none is known."""
    for header in headers:
        for element in _ELEMENT.findall(header):
            match = _PREFERENCE.fullmatch(element.strip(" \t"))
            if match is not None:
                name, value = match[1].lower(), match[2] or ""
                if value.startswith('"'):
                    value = re.sub(r"\\(.)", r"\1", value[1:-1])
                yield name, value
