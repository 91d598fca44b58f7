"""Tokens that need not be computed again: what earlier sequences left in the context, and states in
host memory. No runtime: llama.cpp's memory is behind `Memory`.

A sequence gets the slot, or the stored state, that begins with most of its prompt. A state moves to
host memory when its slot is needed for other tokens.
"""

from collections.abc import Iterable, Sized
from typing import Protocol

from services.inferer.engine.sequence import Sequence

WORTH_KEEPING = 64
"""Tokens. Fewer are computed again about as fast as a state is stored and loaded."""


class Memory(Protocol):
    """What the context's slots hold, one sequence each."""

    can_copy: bool
    """Whether slots can share tokens."""

    def can_truncate(self, length: int) -> bool:
        """Whether the end of a sequence of ``length`` tokens can be removed, however much. A
        sliding window has forgotten what it needs for that, a recurrent state has no parts."""

    def truncate(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` tokens of ``slot``; False if llama.cpp cannot."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give ``target``, an empty slot, the first ``length`` tokens of ``source``."""

    def state_bytes(self, slot: int) -> int:
        """How much `save` takes; 0 if there is too little memory for it."""

    def save(self, slot: int) -> Sized | None:
        """The state of ``slot``, with its size in bytes as its length; None if llama.cpp cannot."""

    def load(self, slot: int, state: Sized) -> bool:
        """Put a state of `save` into ``slot``, which is empty; False if llama.cpp cannot."""


class _Prefix:
    """Tokens whose state is in a slot, or in ``state``."""

    def __init__(self, owner: str, tokens: list[int], state: Sized = ()) -> None:
        self.owner = owner
        self.tokens = tokens
        self.state = state

    def common(self, sequence: Sequence) -> int:
        """How many tokens it shares with ``sequence``'s prompt, without the prompt's last: that one
        is always computed, as its output is wanted."""
        if self.owner != sequence.owner:
            return 0
        return common_prefix(self.tokens, sequence.tokens[:-1])


class PromptCache:
    """Not thread-safe: the compute thread owns it."""

    def __init__(self, memory: Memory, capacity: int) -> None:
        """``capacity``: bytes of host memory for states."""
        self.memory = memory
        self._capacity = capacity
        self._left: dict[int, _Prefix] = {}
        """What is in the slots that no sequence has, least recently used first."""
        self._stored: list[_Prefix] = []
        """In host memory, least recently used first."""

    @property
    def kept_slots(self) -> list[int]:
        """The free slots that hold something."""
        return list(self._left)

    @property
    def stored_bytes(self) -> int:
        return sum(len(prefix.state) for prefix in self._stored)

    def place(
        self, sequence: Sequence, free_slots: list[int], running: Iterable[Sequence]
    ) -> tuple[int, int]:
        """Choose one of ``free_slots`` for a sequence, which has its prompt alone, and have the
        slot hold as much of that as is known: ``(slot, tokens)``.

        Sets the sequence's ``checkpoint`` where others begin with the same tokens, but what is
        known of those cannot be used.
        """
        if sequence.is_cold:
            return self._empty(free_slots), 0
        best, tokens = self._best_of(sequence, self._left.values())
        stored, stored_tokens = self._best_of(sequence, self._stored)
        source, copied = self._best_running(sequence, running)
        if stored_tokens >= max(tokens, copied) + WORTH_KEEPING and stored is not None:
            slot, tokens = self._restore(stored, stored_tokens, free_slots)
        elif source is not None and copied > tokens:
            slot, tokens = self._empty(free_slots), copied
            self.memory.copy(source.slot, slot, copied)
        elif best is not None:
            slot = next(slot for slot, prefix in self._left.items() if prefix is best)
            tokens = self._reuse(slot, tokens)
        else:
            slot = self._empty(free_slots)
        if sequence.checkpoint - tokens < WORTH_KEEPING:
            sequence.checkpoint = 0
        return slot, tokens

    def leave(self, sequence: Sequence) -> None:
        """Keep what a sequence that has ended left in its slot."""
        if sequence.position:
            tokens = sequence.tokens[: sequence.position]
            self._left[sequence.slot] = _Prefix(sequence.owner, tokens)

    def save_checkpoint(self, sequence: Sequence) -> None:
        """Keep the state that a running sequence has now."""
        self._store(sequence.slot, _Prefix(sequence.owner, sequence.tokens[: sequence.position]))

    def forget(self, slot: int) -> None:
        """The slot has lost what it held."""
        self._left.pop(slot, None)

    def _best_of(
        self, sequence: Sequence, prefixes: Iterable[_Prefix]
    ) -> tuple[_Prefix | None, int]:
        """The prefix that saves most tokens, and how many; notes where a checkpoint would help."""
        best, most = None, 0
        for prefix in prefixes:
            common = prefix.common(sequence)
            if common < len(prefix.tokens) and not self.memory.can_truncate(len(prefix.tokens)):
                sequence.checkpoint = max(sequence.checkpoint, common)
            elif common > most:
                best, most = prefix, common
        return best, most

    def _best_running(
        self, sequence: Sequence, running: Iterable[Sequence]
    ) -> tuple[Sequence | None, int]:
        best, most = None, 0
        if self.memory.can_copy:
            for other in running:
                computed = other.tokens[: other.position]
                common = _Prefix(other.owner, computed).common(sequence)
                if common > most and self.memory.can_truncate(other.position):
                    best, most = other, common
        return best, most

    def _reuse(self, slot: int, tokens: int) -> int:
        """Keep the first ``tokens`` in a free slot; how many are there now."""
        prefix = self._left[slot]
        if len(prefix.tokens) - tokens >= WORTH_KEEPING:
            self._store(slot, prefix)
        del self._left[slot]
        if tokens < len(prefix.tokens) and not self.memory.truncate(slot, tokens):
            self.memory.truncate(slot, 0)
            return 0
        return tokens

    def _restore(self, stored: _Prefix, tokens: int, free_slots: list[int]) -> tuple[int, int]:
        # Out of the list first: to empty the slot may take room in it.
        self._stored.remove(stored)
        slot = self._empty(free_slots)
        self._stored.append(stored)
        if not self.memory.load(slot, stored.state):
            self._stored.remove(stored)
            self.memory.truncate(slot, 0)
            return slot, 0
        if tokens < len(stored.tokens) and not self.memory.truncate(slot, tokens):
            self.memory.truncate(slot, 0)
            return slot, 0
        return slot, tokens

    def _empty(self, free_slots: list[int]) -> int:
        """A free slot with nothing in it: one that held nothing, or what was used longest ago."""
        for slot in free_slots:
            if slot not in self._left:
                return slot
        slot = next(iter(self._left))
        prefix = self._left[slot]
        if len(prefix.tokens) >= WORTH_KEEPING:
            self._store(slot, prefix)
        del self._left[slot]
        self.memory.truncate(slot, 0)
        return slot

    def _store(self, slot: int, prefix: _Prefix) -> None:
        """Put the state of ``slot`` into host memory, if it fits and adds something."""
        for known in self._stored:
            if self._contains(known, prefix):
                self._stored.remove(known)
                self._stored.append(known)
                return
        size = self.memory.state_bytes(slot)
        if not 0 < size <= self._capacity:
            return
        self._stored = [known for known in self._stored if not self._contains(prefix, known)]
        while self.stored_bytes + size > self._capacity:
            del self._stored[0]
        state = self.memory.save(slot)
        if state is not None:
            self._stored.append(_Prefix(prefix.owner, prefix.tokens, state))

    def _contains(self, longer: _Prefix, shorter: _Prefix) -> bool:
        """Whether whatever ``shorter`` is good for, ``longer`` is too."""
        length = len(shorter.tokens)
        return (
            longer.owner == shorter.owner
            and longer.tokens[:length] == shorter.tokens
            and (len(longer.tokens) == length or self.memory.can_truncate(len(longer.tokens)))
        )


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many items both lists begin with."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:  # by halves: to compare slices is far faster than a loop over the items
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
