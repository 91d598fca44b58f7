"""Which sequences get a slot, and what is in the next batch: policy only, no runtime."""

from collections import deque
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

from services.inferer.engine.sequence import Sequence, State

S = TypeVar("S", bound=Sequence)
S_co = TypeVar("S_co", bound=Sequence, covariant=True)


class Chunk(NamedTuple, Generic[S_co]):
    """The next ``size`` remaining tokens of one sequence, in consecutive rows of a batch."""

    sequence: S_co
    size: int
    last_row: int
    """Where the last of them is in the batch, counted from 0."""
    has_output: bool
    """Whether these are all its remaining tokens, so that the model's output in the last row is
    wanted."""


class Scheduler(Generic[S]):
    """Runs up to ``slots`` sequences at a time; more wait in the order in which they came.

    A batch has at most ``batch_tokens`` tokens. Its order is that in which the prompts would be
    done if each were computed alone from the time its sequence got a slot: first sequences that
    generate, whose prompts are done, then shorter prompts before longer ones. Shorter prompts that
    keep coming cannot starve a longer one. A prompt that does not fit is continued in the next
    batch. Not thread-safe: the compute thread owns it.
    """

    def __init__(self, slots: int, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._slots = slots
        self.free_slots = list(range(slots))
        """To be read only."""
        self._waiting: deque[S] = deque()
        self._running: list[S] = []
        self._clock = 0
        """The capacity of all batches so far, in tokens."""

    @property
    def is_idle(self) -> bool:
        """Whether it has no sequences. May be read from any thread."""
        return not self._running and not self._waiting

    @property
    def running(self) -> list[S]:
        """The sequences with a slot; a copy."""
        return list(self._running)

    def __iter__(self) -> Iterator[S]:
        """All sequences, those with a slot first; over a copy."""
        return iter([*self._running, *self._waiting])

    def add(self, sequence: S) -> None:
        """Queue ``sequence``, which has tokens that are not in the context."""
        sequence.state = State.WAITING
        self._waiting.append(sequence)

    @property
    def next_waiting(self) -> S | None:
        """The sequence to `admit` next; None while no slot is free or no sequence waits."""
        return self._waiting[0] if self._waiting and self.free_slots else None

    def admit(self, slot: int, cached: int = 0) -> None:
        """Give the next sequence ``slot``, a free one, which already has its first ``cached``
        tokens in the context; not all of them."""
        sequence = self._waiting.popleft()
        sequence.state = State.RUNNING
        sequence.slot = slot
        sequence.position = cached
        sequence.due = self._clock + sequence.remaining
        self.free_slots.remove(slot)
        self._running.append(sequence)

    def next_batch(self) -> list[Chunk[S]]:
        """What is to be computed next; empty if no sequence has a slot. `complete` it, or ask
        again: then nothing of it was computed."""
        batch: list[Chunk[S]] = []
        rows = 0
        for sequence in sorted(self._running, key=_due):
            if rows == self._batch_tokens:
                break
            size = min(sequence.remaining, self._batch_tokens - rows)
            if sequence.position < sequence.checkpoint:
                size = min(size, sequence.checkpoint - sequence.position)
            rows += size
            batch.append(Chunk(sequence, size, rows - 1, size == sequence.remaining))
        return batch

    def complete(self, batch: list[Chunk[S]]) -> list[Chunk[S]]:
        """Note that ``batch`` was computed. Returns the chunks with an output: each of their
        sequences needs another token, or must be removed, before the next batch."""
        self._clock += self._batch_tokens
        for sequence, size, _, _ in batch:
            sequence.position += size
        return [chunk for chunk in batch if chunk.has_output]

    def remove(self, sequence: S) -> None:
        """Forget a sequence, which may have a slot or wait for one."""
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self.free_slots.append(sequence.slot)
        else:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED

    def grow(self, slots: int) -> None:
        """Have ``slots`` slots, more than before."""
        self.free_slots += range(self._slots, slots)
        self._slots = slots


_due = attrgetter("due")
