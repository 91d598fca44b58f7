"""What happens to a job before its result, and to inferers."""

from typing import Literal

from msgspec import Struct

from shared.wire.fields import Count, InfererId, check_times
from shared.wire.logprobs import TokenLogprob
from shared.wire.requests import Work
from shared.wire.results import StopCode


class StateEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``infer.states.<model>.<id>``, and ``infer.events.<model>.<id>.state`` for those who follow
    the job. ``attempt`` counts starts, not the broker's deliveries.

    ``code`` and ``message``: what went wrong in an attempt that is followed by another. A
    ``started`` that has them is stored after the attempt's first one, when its inferer has died.
    A ``returned`` that has them is of an inferer that cannot run the job, and has not begun;
    ``returns`` counts these in a row.
    """

    state: Literal["started", "returned", "retrying"]
    attempt: Count
    at: str
    inferer: InfererId
    work: Work | None = None
    code: str | None = None
    message: str | None = None
    returns: Count = 0

    def __post_init__(self) -> None:
        check_times(self.at)


class InfererDeath(Struct, frozen=True, kw_only=True):
    """``infer.deaths.<model>.<inferer>``: an inferer that ended unexpectedly.

    ``cause`` is its signal or exit status, ``doing`` what it did for which of ``jobs``.
    """

    inferer: str
    model: str
    host: str
    at: str
    cause: str
    doing: str
    jobs: list[str] = []

    def __post_init__(self) -> None:
        check_times(self.at)


class TokenFrame(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``infer.events.<model>.<id>.tokens``: the text that each of some tokens in a row added.

    ``index`` is that of the first one. A token whose text waits for the next (half a character,
    the beginning of a stop string) adds ``""``.

    They belong to the answer ``choice``, counted from 0. Several answers come one after another,
    and ``index`` goes on from one to the next.
    """

    attempt: Count
    index: Count
    tokens: list[str]
    logprobs: list[TokenLogprob | None] | None = None
    """Of these tokens, if the request asks for them; None for text that comes without a token."""
    choice: Count = 0


class CancelNotice(Struct, frozen=True):
    """``infer.cancel.<model>.<id>``. The result is stored before it is sent: it only saves work."""

    code: StopCode
