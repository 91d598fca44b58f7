"""Text of others on a terminal: what would be obeyed there instead of shown is made visible."""

import re

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed, and those that reverse the text that follows."""


def printable(text: str) -> str:
    """``text`` with such characters as escapes, ``\\x1b`` for example. Line ends stay line ends."""
    return _OBEYED.sub(
        lambda match: match[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n")
    )


def printable_json(text: str) -> str:
    """JSON with the same values, and such characters as JSON's own escapes."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
