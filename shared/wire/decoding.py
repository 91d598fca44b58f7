"""Bytes that others have put on the broker: decoded, or skipped, counted and logged."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from shared.logs import logger

T = TypeVar("T")

CANNOT_BE_READ = (ValueError, RecursionError)
"""What decoding raises: not JSON, not UTF-8, not of the type or out of range, nested too deeply."""

_skipped: Counter[str] = Counter()

log = logger()


class Unreadable(ValueError):
    """What was received is not what its subject says."""


class Decoder(Generic[T]):
    """Decodes messages of one kind. The types check whatever later code relies on."""

    def __init__(self, what: str, kind: Any) -> None:
        """``what`` names the kind, for people: "state event"; ``kind`` is T."""
        self._what = what
        self._decode: Callable[[bytes | str], T] = msgspec.json.Decoder(kind).decode

    def __call__(self, data: bytes | str) -> T:
        """Raises: Unreadable."""
        try:
            if isinstance(data, bytes):
                data = data.decode()  # also what the type leaves out, or takes as it is
            return self._decode(data)
        except CANNOT_BE_READ as error:
            raise Unreadable(f"no {self._what} of this version of Sluice: {error}") from None

    def read(self, data: bytes | str, subject: str) -> T | None:
        """None for what cannot be read, which is skipped."""
        try:
            return self(data)
        except Unreadable as error:
            skip(self._what, subject, error)
            return None


def skip(what: str, subject: str, error: Exception) -> None:
    """Count a message that could not be read. The first of each kind is logged, then the 10th, the
    100th and so on: a client that can publish one can publish a million."""
    _skipped[what] += 1
    count = _skipped[what]
    if str(count).strip("0") == "1":
        log.warning(
            "unreadable_skipped",
            what=what,
            subject=subject[:200],
            why=str(error)[:200] or type(error).__name__,
            count=count,
        )
