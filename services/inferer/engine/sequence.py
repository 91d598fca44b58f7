"""A sequence of tokens on its way through the model, and its state; no runtime.

What is made of the model's output is not known here: a kind of work is a subclass
(`generation.py`).
"""

from collections import deque
from enum import Enum, auto


class State(Enum):
    """Each state follows the one before; `FINISHED` may follow any."""

    NEW = auto()
    """Its prompt is being prepared; the scheduler does not have it yet."""
    WAITING = auto()
    """It is prepared, and waits for a slot."""
    RUNNING = auto()
    """It has a slot in the context."""
    FINISHED = auto()


class Aborted(Exception):
    """The sequence was aborted before it ended."""


class Sequence:
    """The state of one sequence. The compute thread writes it, unless noted."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.slot = -1
        """The slot that it has, or had last; -1 before the first."""
        self.position = 0
        """Tokens that are in the context."""
        self.pending: deque[int] = deque()
        """Tokens that must go through the model before it has an output; not empty while it is
        scheduled. A preparation thread adds the prompt, before the compute thread gets the
        sequence."""
        self.due = 0
        """When its prompt would be computed, on the scheduler's clock, if it ran alone; the
        sequence that is due first is served first."""
        self.aborted = False
        """Set by any thread, under the engine's lock; read by the compute thread and preparation
        threads."""
