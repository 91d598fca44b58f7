"""The caller of a request: its owner, and the way by which the request came."""

from dataclasses import dataclass, field

from shared.wire.requests import Via
from shared.wire.subjects import PUBLIC
from shared.wire.trace import Trace


@dataclass(frozen=True)
class Caller:
    """Made where a request comes in, and passed on to all that is done for it."""

    via: Via
    owner: str = PUBLIC
    """Never taken from the request; there are no keys yet that would distinguish owners."""
    trace: Trace = field(default_factory=dict)
    """W3C trace context."""
