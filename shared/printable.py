"""Escapes control characters in untrusted text, so that a terminal does not interpret them."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed, and those that reverse the text that follows."""


def printable(text: str) -> str:
    """``text`` with control characters as escapes, for example ``\\x1b``. Line ends are kept."""
    return _CONTROL.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n")
    )


def printable_json(text: str) -> str:
    """The same JSON with control characters as JSON escapes."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
