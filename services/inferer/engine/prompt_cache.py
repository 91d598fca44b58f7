"""Tokens that need not be computed again: what earlier sequences left in the context, and states in
host memory. No runtime: llama.cpp's memory is behind `Memory`.

A sequence gets the slot, or the saved state, that begins with most of its prompt. A state moves to
host memory when its slot is needed for other tokens. A fault here costs time, never a wrong text:
what a slot holds is checked before it is used.
"""

from collections.abc import Iterable, Sized
from typing import NamedTuple, Protocol

from services.inferer.engine.sequence import Sequence

WORTH_KEEPING = 64
"""Tokens. Fewer are computed again about as fast as a state is saved and loaded."""
LONGEST_SOURCE = 32
"""A sequence is always copied as a whole, but only if it has at most this many times as many
tokens as are wanted. Copying a token takes a hundredth of the time of computing it."""
MOST_AHEAD = 0.5
"""The share of the capacity for states that are saved while their slots still hold them."""
MOST_MOVED = 2048
"""Tokens that are moved to another slot at once: about 40 ms with SmolLM2-135M."""


class SavedState(NamedTuple):
    """A copy of what a slot held."""

    data: Sized
    """Its length is its size in bytes."""
    shortest: int
    """See `Memory.shortest`."""


class Memory(Protocol):
    """What the context's slots hold, one sequence each."""

    can_copy: bool
    """Whether tokens can be copied from slot to slot, and sequences moved."""

    def length(self, slot: int) -> int:
        """How many tokens ``slot`` holds."""

    def shortest(self, slot: int) -> int:
        """The fewest tokens that ``slot`` can be cut to: usually 0; with a sliding window, the
        shortest length whose window is still complete; for a recurrent state, which has no parts,
        its whole length."""

    def truncate(self, slot: int, length: int) -> bool:
        """Keep the first ``length`` tokens of ``slot``; False if llama.cpp cannot."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Give ``target``, an empty slot, the first ``length`` tokens of ``source``."""

    def state_bytes(self, slot: int) -> int:
        """The size of a state that `save` returns; 0 if there is too little memory for it."""

    def save(self, slot: int) -> SavedState | None:
        """The state of ``slot``; None if llama.cpp cannot."""

    def load(self, slot: int, state: SavedState) -> bool:
        """Put a saved state into ``slot``, which is empty; False if llama.cpp cannot."""


class _Prefix:
    """Tokens whose state is in ``slot``, or saved."""

    def __init__(
        self,
        key: tuple[str, str],
        tokens: list[int],
        slot: int = -1,
        saved: SavedState | None = None,
    ) -> None:
        self.key = key
        """See `Sequence.cache_key`."""
        self.tokens = tokens
        self.slot = slot
        self.saved = saved

    @property
    def size(self) -> int:
        return len(self.saved.data) if self.saved else 0


class PromptCache:
    """Not thread-safe: the compute thread owns it."""

    def __init__(self, memory: Memory, capacity: int) -> None:
        """``capacity``: bytes of host memory for states. With 0 nothing is reused at all."""
        self.memory = memory
        self._capacity = capacity
        self._left: dict[int, _Prefix] = {}
        """What is in the slots that no sequence has, least recently used first."""
        self._saved: list[_Prefix] = []
        """In host memory, least recently used first."""

    @property
    def kept_slots(self) -> list[int]:
        """The free slots that hold something."""
        return list(self._left)

    @property
    def saved_bytes(self) -> int:
        return sum(prefix.size for prefix in self._saved)

    def place(
        self, sequence: Sequence, free_slots: list[int], running: Iterable[Sequence]
    ) -> tuple[int, int]:
        """Choose one of ``free_slots`` for a sequence that has only its prompt so far, and put as
        much of that prompt into the slot as the cache has. Returns the slot and the number of
        tokens in it. The prompt's last token is always computed, because its output is needed.

        Sets the sequence's ``checkpoint`` where other prompts begin with the same tokens, but
        their states cannot be cut to them.
        """
        if sequence.is_cold or not self._capacity:
            return self._empty_slot(free_slots), 0
        prefixes = [
            *self._left.values(),
            *(
                _Prefix(other.cache_key, other.tokens[: other.position], other.slot)
                for other in running
                if self.memory.can_copy
            ),
            *self._saved,
        ]
        best, tokens = self._best(sequence, prefixes)
        if best is None or (tokens < WORTH_KEEPING <= len(best.tokens) - tokens):
            slot, tokens = self._empty_slot(free_slots), 0
        elif best.saved is not None:
            slot = self._load(best, free_slots)
        elif best.slot in free_slots and not self._is_copied(best, tokens, free_slots):
            slot = best.slot
            self._make_room(slot, tokens)
        else:
            slot = self._empty_slot(free_slots, spared=best.slot)
            self.memory.copy(best.slot, slot, tokens)
            if best.slot in self._left:
                self._left[best.slot] = self._left.pop(best.slot)
        tokens = self._cut(slot, tokens)
        if sequence.checkpoint - tokens < WORTH_KEEPING:
            sequence.checkpoint = 0
        return slot, tokens

    def rewind(self, sequence: Sequence, length: int, start: SavedState | None) -> int:
        """Take a running sequence back to its first ``length`` tokens. ``start`` is what its slot
        had then, for where it cannot be cut to them. Returns how many tokens the slot has now: 0 if
        all have to be computed again."""
        memory, slot = self.memory, sequence.slot
        if memory.shortest(slot) > length:
            memory.truncate(slot, 0)
            if start is not None:
                memory.load(slot, start)
        return self._cut(slot, length)

    def copy_of(self, slot: int) -> SavedState | None:
        """What ``slot`` holds; None if llama.cpp cannot save it, or there is no memory for it."""
        return self.memory.save(slot) if self.memory.state_bytes(slot) else None

    def leave(self, sequence: Sequence) -> None:
        """Keep what a sequence that has ended left in its slot."""
        if self._capacity and sequence.position:
            tokens = sequence.tokens[: sequence.position]
            self._left[sequence.slot] = _Prefix(sequence.cache_key, tokens, sequence.slot)
        else:
            self.memory.truncate(sequence.slot, 0)

    def move(self, sequence: Sequence, slot: int) -> bool:
        """Exchange what a running sequence has in its slot for what ``slot``, a free one, holds.

        False if llama.cpp cannot, there is too little memory, or ``slot`` holds too much: then the
        sequence keeps its slot.
        """
        memory, source = self.memory, sequence.slot
        kept = self._left.get(slot)
        if kept is not None and len(kept.tokens) > MOST_MOVED:
            return False
        state = self.copy_of(source)
        kept_state = self.copy_of(slot) if kept else None
        if (sequence.position and state is None) or (kept and kept_state is None):
            return False
        self.forget(slot)
        memory.truncate(slot, 0)
        if state is not None and not memory.load(slot, state):
            memory.truncate(slot, 0)
        if memory.length(slot) != sequence.position:
            memory.truncate(slot, 0)
            return False
        memory.truncate(source, 0)
        if kept and kept_state:
            if memory.load(source, kept_state):
                kept.slot = source
                self._left[source] = kept
            else:
                memory.truncate(source, 0)
        return True

    def save_checkpoint(self, sequence: Sequence) -> None:
        """Keep the state that a running sequence has now."""
        tokens = sequence.tokens[: sequence.position]
        self._save(_Prefix(sequence.cache_key, tokens, sequence.slot))

    def save_ahead(self, free_slots: list[int]) -> bool:
        """Save what one of ``free_slots`` holds before another prompt needs the slot, so that no
        prompt has to wait for it. Only if no slot is empty. Returns whether a state was saved."""
        if not all(slot in self._left for slot in free_slots):
            return False
        ahead = 0
        for prefix in self._left.values():
            if len(prefix.tokens) < WORTH_KEEPING:
                continue
            size = self.memory.state_bytes(prefix.slot)
            ahead += size
            if not size or ahead > self._capacity * MOST_AHEAD:
                return False
            if not self._is_saved(prefix):
                self._save(prefix)
                return self._is_saved(prefix)
        return False

    def forget(self, slot: int) -> None:
        """The slot has lost what it held."""
        self._left.pop(slot, None)

    def _best(self, sequence: Sequence, prefixes: list[_Prefix]) -> tuple[_Prefix | None, int]:
        """The prefix that saves most tokens, and how many; notes where a checkpoint would help."""
        wanted = sequence.tokens[:-1]
        best, most = None, 0
        for prefix in prefixes:
            if prefix.key != sequence.cache_key:
                continue
            common = common_prefix(prefix.tokens, wanted)
            if self._is_running(prefix) and len(prefix.tokens) > LONGEST_SOURCE * common:
                continue
            if not self._can_cut(prefix, common):
                sequence.checkpoint = max(sequence.checkpoint, common)
            elif common > most + (WORTH_KEEPING if prefix.saved else 0):
                best, most = prefix, common
        return best, most

    def _is_running(self, prefix: _Prefix) -> bool:
        return prefix.saved is None and prefix.slot not in self._left

    def _can_cut(self, prefix: _Prefix, length: int) -> bool:
        if length == len(prefix.tokens):
            return True
        shortest = prefix.saved.shortest if prefix.saved else self.memory.shortest(prefix.slot)
        return length >= shortest

    def _is_copied(self, prefix: _Prefix, tokens: int, free_slots: list[int]) -> bool:
        """Whether another slot gets the first ``tokens``, so that the others stay too."""
        longest = LONGEST_SOURCE * tokens
        is_worth_it = tokens + WORTH_KEEPING <= len(prefix.tokens) <= longest
        has_room = any(slot not in self._left for slot in free_slots)
        return self.memory.can_copy and is_worth_it and has_room

    def _load(self, prefix: _Prefix, free_slots: list[int]) -> int:
        assert prefix.saved is not None
        # Out of the list first: to empty the slot may take room in it.
        self._saved.remove(prefix)
        slot = self._empty_slot(free_slots)
        if self.memory.load(slot, prefix.saved):
            self._saved.append(prefix)
            self._drop_excess()
        return slot

    def _cut(self, slot: int, tokens: int) -> int:
        """Keep the first ``tokens`` in a slot; how many there are then: if anything is not as
        expected, none."""
        memory = self.memory
        if memory.length(slot) > tokens and not memory.truncate(slot, tokens):
            tokens = 0
        if memory.length(slot) != tokens:
            memory.truncate(slot, 0)
            tokens = 0
        return tokens

    def _empty_slot(self, free_slots: list[int], spared: int = -1) -> int:
        """A free slot with nothing in it: one that held nothing, or what was used longest ago; not
        ``spared``."""
        slot = next((slot for slot in free_slots if slot not in self._left), None)
        if slot is None:
            slot = next(slot for slot in self._left if slot != spared)
            self._make_room(slot, 0)
        # It may hold what a call left that failed.
        self.memory.truncate(slot, 0)
        return slot

    def _make_room(self, slot: int, tokens: int) -> None:
        """Save what a slot holds, if it has much more than its first ``tokens``."""
        prefix = self._left.pop(slot)
        if len(prefix.tokens) - tokens >= WORTH_KEEPING:
            self._save(prefix)

    def _save(self, prefix: _Prefix) -> None:
        """Put the state of a slot into host memory, if it fits and adds something."""
        for known in self._saved:
            if self._contains(known, prefix):
                self._saved.remove(known)
                self._saved.append(known)
                return
        size = self.memory.state_bytes(prefix.slot)
        if not 0 < size <= self._capacity:
            return
        saved = self.memory.save(prefix.slot)
        if saved is None:
            return
        longer = _Prefix(prefix.key, prefix.tokens, saved=saved)
        self._saved = [known for known in self._saved if not self._contains(longer, known)]
        self._saved.append(longer)
        self._drop_excess()

    def _is_saved(self, prefix: _Prefix) -> bool:
        return any(self._contains(known, prefix) for known in self._saved)

    def _drop_excess(self) -> None:
        while self.saved_bytes > self._capacity:
            del self._saved[0]

    def _contains(self, longer: _Prefix, shorter: _Prefix) -> bool:
        """Whether ``longer`` serves for everything that ``shorter`` serves for."""
        length = len(shorter.tokens)
        return (
            longer.key == shorter.key
            and longer.tokens[:length] == shorter.tokens
            and self._can_cut(longer, length)
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
