"""What llama.cpp logs: the reasons of failures, for the errors that quote them."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp

LEVEL_WARNING, LEVEL_ERROR = 3, 4
NO_REASON = "no reason given"

_problems: deque[str] = deque(maxlen=8)
_lines: list[str] | None = None
"""Where `log_lines` collects; the callback stays the same, as another thread may be in it."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log_llama(level: int, text: bytes, _data: object) -> None:
    """Keep llama.cpp's errors and warnings for the exceptions that quote them, and whatever
    `log_lines` collects; drop all others."""
    line = text.decode("utf-8", "replace").strip()
    if _lines is not None:
        _lines.append(line)
    elif level in (LEVEL_WARNING, LEVEL_ERROR) and line:
        _problems.append(line)


def keep_problems() -> None:
    """From now on; before, llama.cpp logs to stderr."""
    llama_cpp.llama_log_set(_log_llama, None)


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """All lines that llama.cpp logs during the block, which are not kept for `last_problem`."""
    global _lines
    keep_problems()
    lines: list[str] = []
    _lines = lines
    try:
        yield lines
    finally:
        _lines = None


def forget_problems() -> None:
    """What llama.cpp has logged so far is not the reason of what fails next."""
    _problems.clear()


def first_problem() -> str:
    """The first error or warning that llama.cpp logged since they were forgotten, of the last
    eight."""
    return _problems[0] if _problems else NO_REASON


def last_problem() -> str:
    """The last error or warning that llama.cpp logged."""
    return _problems[-1] if _problems else NO_REASON
