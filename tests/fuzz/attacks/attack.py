"""The attacks there are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.target import Target

Send = Callable[[Target, Any], None]


@dataclass(frozen=True)
class Attack:
    name: str
    cases: st.SearchStrategy[Any]
    send: Send
    count: int
    """How many cases in a row."""


ATTACKS: dict[str, Attack] = {}


def attack(cases: st.SearchStrategy[Any], count: int = 20) -> Callable[[Send], Send]:
    def add(send: Send) -> Send:
        ATTACKS[send.__name__] = Attack(send.__name__, cases, send, count)
        return send

    return add
