"""One finding of ``sluice doctor``."""

from typing import Literal

from msgspec import Struct

Severity = Literal["ok", "warning", "error"]


class Finding(Struct, frozen=True, kw_only=True):
    """What was examined, what was found, and what to do about it."""

    about: str
    severity: Severity
    found: str
    advice: str | None = None


def ok(about: str, found: str) -> Finding:
    return Finding(about=about, severity="ok", found=found)


def warning(about: str, found: str, advice: str) -> Finding:
    """A possible cause, which may also be intended."""
    return Finding(about=about, severity="warning", found=found, advice=advice)


def error(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, severity="error", found=found, advice=advice)
