"""A sequence of tokens on its way through the model, and its state; no runtime.

What is made of the model's output is not known here: a kind of work is a subclass
(`generation.py`).
"""

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
        self.tokens: list[int] = []
        """The prompt, and what has been generated since. A preparation thread adds the prompt,
        before the compute thread gets the sequence. Its end is not in the context yet while it is
        scheduled."""
        self.position = 0
        """How many of them are in the context."""
        self.uncached = 0
        """How many tokens of its prompt were not in the context when it got its slot."""
        self.checkpoint = 0
        """A batch ends where so many tokens are in the context: others begin with the same ones,
        and the state there is worth keeping. 0 is nowhere."""
        self.draft: list[int] = []
        """Guesses of the tokens that follow. The next batch may check some of them."""
        self.streak = 0
        """How many guesses in a row were right, up to the last token."""
        self.guesses: list[tuple[int, bool]] = []
        """The latest ones, of which `Speculation` has not learned: the streak before each, and
        whether it was right."""
        self.owner = ""
        """What is in the context of one owner's sequences is not reused for another's."""
        self.adapter = ""
        """The LoRA adapter that it is computed with; empty for the model alone."""
        self.is_cold = False
        """Whether nothing is reused for it."""
        self.is_repeatable = False
        """Whether its text should be the same each time. Then nothing is guessed from earlier
        answers: rounding depends on how many guesses a batch checks."""
        self.due = 0
        """When its prompt would be computed, on the scheduler's clock, if it ran alone; the
        sequence that is due first is served first."""
        self.turn = 0
        """The number of the last batch in which it generated."""
        self.delay_s = 0.0
        """How much longer it has taken so far because of others, as estimated."""
        self.aborted = False
        """Set by any thread, under the engine's lock; read by the compute thread and preparation
        threads."""

    @property
    def cache_key(self) -> tuple[str, str]:
        """What is in the context of sequences with another one is not reused."""
        return self.owner, self.adapter

    @property
    def remaining(self) -> int:
        """Tokens that must go through the model before it has an output."""
        return len(self.tokens) - self.position
