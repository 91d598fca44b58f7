"""Text of others on a terminal, and in JSON."""

import json
import os
import pty
import unicodedata

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as some

from shared.logs import configure_logs, logger
from shared.printable import printable, printable_json

DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\\rb"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\x7f\x00\x08", "\\x9b31m\\x7f\\x00\\x08"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("naïve שלום 👩‍👩‍👧 日本", "naïve שלום 👩‍👩‍👧 日本"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    """Control characters are escapes, all other text is as it was."""
    assert printable(text) == shown


@given(some.text())
def test_no_control_character_is_left(text: str) -> None:
    """Of any text; and JSON means the same as before."""
    for left in printable(text):
        assert left in "\t\n" or (
            unicodedata.category(left) != "Cc" and ord(left) not in DIRECTIONS
        )
    safe = printable_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(safe) == text
    assert not any(unicodedata.category(c) == "Cc" or ord(c) in DIRECTIONS for c in safe)


def test_log_lines_on_a_terminal_hold_no_foreign_control_characters() -> None:
    """Neither a field nor an exception brings an order to the terminal: what is there is ours."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        configure_logs("test", stream=terminal)
        try:
            raise ValueError("\x1b]0;evil\x07")
        except ValueError:
            logger().exception("request_crashed", model="\x1b]0;evil\x07", path=["\x1b]0;evil"])
        terminal.flush()
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    structlog.reset_defaults()
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert shown.count("\\x1b]0;evil") >= 3
