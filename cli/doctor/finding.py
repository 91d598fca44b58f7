"""What ``sluice doctor`` has to say on one question."""

from typing import Literal

from msgspec import Struct

Verdict = Literal["ok", "look", "wrong"]


class Finding(Struct, frozen=True, kw_only=True):
    """What a question is about, what was found, and what to do about it."""

    about: str
    verdict: Verdict
    found: str
    advice: str | None = None


def ok(about: str, found: str) -> Finding:
    return Finding(about=about, verdict="ok", found=found)


def look(about: str, found: str, advice: str) -> Finding:
    """It may be as it should be, and may be the cause."""
    return Finding(about=about, verdict="look", found=found, advice=advice)


def wrong(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, verdict="wrong", found=found, advice=advice)
