"""Which tokens are reused, without a model: memories of three kinds that hold tokens for states."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inferer.engine.prompt_cache import (
    LONGEST_SOURCE,
    MOST_MOVED,
    WORTH_KEEPING,
    PromptCache,
    SavedState,
    common_prefix,
)
from services.inferer.engine.scheduler import Scheduler
from services.inferer.engine.sequence import Sequence, State

BATCH_TOKENS = 100
SYSTEM = list(range(1000, 1000 + 2 * WORTH_KEEPING))
"""The beginning of many prompts."""


@dataclass
class Tokens:
    """Slots that hold tokens in place of llama.cpp's states; a token takes a byte."""

    can_copy: bool = True
    is_recurrent: bool = False
    window: int = 0
    slots: dict[int, list[int]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)
    """Of slots whose window has forgotten the tokens before."""

    def length(self, slot: int) -> int:
        return len(self.slots.get(slot, []))

    def shortest(self, slot: int) -> int:
        if self.is_recurrent:
            return self.length(slot)
        first = self.first.get(slot, 0)
        return first + self.window - 1 if first else 0

    def truncate(self, slot: int, length: int) -> bool:
        held = self.slots.get(slot, [])
        assert length == 0 or length >= min(self.shortest(slot), len(held)), "a wrong text"
        self.slots[slot] = held[:length]
        if not length:
            self.first.pop(slot, None)
        return True

    def copy(self, source: int, target: int, length: int) -> None:
        assert self.can_copy
        assert not self.slots.get(target)
        assert length >= self.shortest(source), "a wrong text"
        self.slots[target] = self.slots[source][:length]
        if source in self.first:
            self.first[target] = self.first[source]

    def state_bytes(self, slot: int) -> int:
        return self.length(slot)

    def save(self, slot: int) -> SavedState:
        first = max(self.first.get(slot, 0), self.length(slot) - self.window if self.window else 0)
        data = list(self.slots[slot])
        shortest = self.length(slot) if self.is_recurrent else first and first + self.window - 1
        return SavedState(data, shortest)

    def load(self, slot: int, state: SavedState) -> bool:
        assert isinstance(state.data, list)
        assert not self.slots.get(slot)
        self.slots[slot] = list(state.data)
        if state.shortest and not self.is_recurrent:
            self.first[slot] = state.shortest - self.window + 1
        return True

    def forget(self, slot: int) -> None:
        """What is outside the window makes room for tokens of others."""
        if self.window and self.length(slot) > self.window:
            self.first[slot] = self.length(slot) - self.window


class Runner:
    """The engine without the model: what a sequence computes is put into its slot."""

    def __init__(self, memory: Tokens, slots: int, capacity: int = 10_000) -> None:
        self.memory = memory
        self.slots = slots
        self.cache = PromptCache(memory, capacity)
        self.scheduler: Scheduler[Sequence] = Scheduler(slots, BATCH_TOKENS)

    def add(self, prompt: list[int], owner: str = "us") -> Sequence:
        sequence = Sequence()
        sequence.tokens, sequence.owner = list(prompt), owner
        self.scheduler.add(sequence)
        return sequence

    def admit(self) -> None:
        while (sequence := self.scheduler.next_waiting) is not None:
            slot, cached = self.cache.place(
                sequence, self.scheduler.free_slots, self.scheduler.running
            )
            held = self.memory.slots.get(slot, [])
            assert held == sequence.tokens[:cached], "the slot holds what is said, and no more"
            assert cached < len(sequence.tokens), "the last token is computed"
            self.scheduler.admit(slot, cached)

    def close_gaps(self) -> None:
        while self.memory.can_copy and (move := self.scheduler.next_move(MOST_MOVED)):
            sequence, slot = move
            left = {tuple(prefix.tokens) for prefix in self.cache._left.values()}
            if not self.cache.move(sequence, slot):
                return
            self.scheduler.move(sequence, slot)
            assert {tuple(prefix.tokens) for prefix in self.cache._left.values()} == left

    def step(self) -> None:
        """A batch. A sequence with an output gets another token."""
        self.admit()
        self.close_gaps()
        batch = self.scheduler.next_batch()
        for sequence, size, *_ in batch:
            held = self.memory.slots.setdefault(sequence.slot, [])
            held += sequence.tokens[sequence.position :][:size]
        for chunk in self.scheduler.complete(batch, 0.01):
            chunk.sequence.tokens.append(len(chunk.sequence.tokens))
        for sequence, *_ in batch:
            if sequence.position == sequence.checkpoint:
                self.cache.save_checkpoint(sequence)

    def end(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self.cache.leave(sequence)
        self.scheduler.remove(sequence)

    def save_ahead(self) -> int:
        """What the engine does while it is idle; the bytes that are saved then."""
        while self.cache.save_ahead(self.scheduler.free_slots):
            pass
        return self.cache.saved_bytes

    def run(self, prompt: list[int], owner: str = "us", tokens: int = 3) -> int:
        """Run a sequence to its end; how many tokens of its prompt were reused."""
        sequence = self.add(prompt, owner)
        self.admit()
        cached = sequence.position
        while len(sequence.tokens) < len(prompt) + tokens:
            self.step()
        self.end(sequence)
        return cached


def test_the_second_turn_computes_only_what_is_new() -> None:
    runner = Runner(Tokens(), slots=1)
    first = [*SYSTEM, 1, 2]
    assert runner.run(first) == 0
    answer = [len(first), len(first) + 1]
    assert runner.run([*first, *answer, 9, 9, 9]) == len(first) + len(answer)


def test_the_same_prompt_again_computes_its_last_token() -> None:
    """As its output is wanted."""
    runner = Runner(Tokens(), slots=1)
    runner.run(SYSTEM)
    assert runner.run(SYSTEM) == len(SYSTEM) - 1


def test_a_shared_beginning_is_found_in_another_job_that_runs() -> None:
    runner = Runner(Tokens(), slots=2)
    running = runner.add([*SYSTEM, 1])
    while running.remaining > 1 or running.position < len(SYSTEM):
        runner.step()
    assert runner.run([*SYSTEM, 2]) == len(SYSTEM)


def test_what_made_room_comes_back_from_host_memory() -> None:
    """Two conversations in turn on one slot."""
    runner = Runner(Tokens(), slots=1)
    one, other = [1, *SYSTEM], [2, *SYSTEM]
    assert [runner.run(prompt) for prompt in (one, other, one, other)] == [
        0,
        0,
        len(one) - 1,
        len(other) - 1,
    ]


def test_what_will_have_to_make_room_is_saved_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once no slot is empty; then the next prompt does not wait until a state is saved."""
    runner = Runner(Tokens(), slots=2)
    one, other = [1, *SYSTEM], [2, *SYSTEM]
    runner.run(one)
    assert runner.save_ahead() == 0
    runner.run(other)
    assert runner.save_ahead() > len(one) + len(other)

    def fail(slot: int) -> SavedState:
        raise AssertionError("it is saved again")

    monkeypatch.setattr(runner.memory, "save", fail)
    runner.run([3, *SYSTEM])
    assert runner.run(one) == len(one) - 1


def test_older_states_make_room_for_what_is_saved_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all prompts would wait once the store is full."""
    capacity = 4 * len(SYSTEM)
    runner = Runner(Tokens(), slots=1, capacity=capacity)
    for number in range(6):
        runner.run([number, *SYSTEM])
    assert runner.cache.saved_bytes > 2 * len(SYSTEM)
    assert 2 * len(SYSTEM) < runner.save_ahead() <= capacity

    def fail(slot: int) -> SavedState:
        raise AssertionError("the prompt waits")

    monkeypatch.setattr(runner.memory, "save", fail)
    assert runner.run([4, *SYSTEM]) == len(SYSTEM)


def test_half_of_the_store_is_for_states_that_no_slot_has() -> None:
    runner = Runner(Tokens(), slots=1, capacity=2 * len(SYSTEM))
    runner.run([1, *SYSTEM])
    runner.run([2, *SYSTEM])
    before = runner.cache.saved_bytes
    assert before > len(SYSTEM)
    assert runner.save_ahead() == before
    assert runner.run([1, *SYSTEM]) == len(SYSTEM)


def test_the_store_stays_within_its_bound() -> None:
    """What was used longest ago goes first; what is larger than the bound is not stored."""
    long = [99, *range(1000)]
    runner = Runner(Tokens(), slots=1, capacity=3 * len(SYSTEM))
    prompts = [[number, *SYSTEM] for number in range(5)]
    for prompt in [long, *prompts]:
        runner.run(prompt)
    assert 0 < runner.cache.saved_bytes <= 3 * len(SYSTEM)
    assert runner.run(prompts[3]) > 0
    assert runner.run(prompts[0]) == 0
    assert runner.run(long) == 0


def test_nothing_is_stored_without_a_bound() -> None:
    runner = Runner(Tokens(), slots=1, capacity=0)
    runner.run([1, *SYSTEM])
    runner.run([2, *SYSTEM])
    assert (runner.cache.saved_bytes, runner.run([1, *SYSTEM])) == (0, 0)


def test_what_a_longer_state_contains_goes_first() -> None:
    runner = Runner(Tokens(), slots=1)
    turn = [1, *SYSTEM]
    for _ in range(3):
        runner.run(turn)
        runner.run([2, *SYSTEM])
        turn = [*turn, *SYSTEM]
    # The two conversations; not the turns of the first.
    assert runner.cache.saved_bytes < 2 * len(turn)


def test_another_owner_finds_nothing() -> None:
    """Neither in a slot, nor in host memory, nor in a job that runs."""
    runner = Runner(Tokens(), slots=2)
    runner.run(SYSTEM, "them")
    runner.run([1, *SYSTEM], "them")
    runner.run([2, *SYSTEM], "them")
    running = runner.add(SYSTEM, "them")
    runner.step()
    runner.step()
    assert running.position
    assert runner.run(SYSTEM, "us") == 0
    assert runner.run(SYSTEM, "them") > 0


def test_a_cold_job_reuses_nothing_and_leaves_its_state() -> None:
    runner = Runner(Tokens(), slots=1)
    runner.run(SYSTEM)
    cold = runner.add(SYSTEM)
    cold.is_cold = True
    runner.admit()
    assert cold.position == 0
    while len(cold.tokens) < len(SYSTEM) + 2:
        runner.step()
    runner.end(cold)
    assert runner.run(SYSTEM) == len(SYSTEM) - 1


def test_a_recurrent_state_is_reused_as_a_whole_and_kept_where_prompts_part() -> None:
    """The second prompt with the same beginning is computed, and the state at the end of what they
    share is saved; the third begins there."""
    runner = Runner(Tokens(can_copy=False, is_recurrent=True), slots=1)
    cached = [runner.run([*SYSTEM, number]) for number in range(1, 5)]
    assert cached == [0, 0, len(SYSTEM), len(SYSTEM)]
    first = [7, *SYSTEM]
    runner.run(first)
    answer = [len(first), len(first) + 1]
    assert runner.run([*first, *answer, 9]) == len(first) + len(answer)


def test_a_sliding_window_is_cut_only_to_what_it_still_covers() -> None:
    runner = Runner(Tokens(window=50), slots=1)
    assert runner.run([*SYSTEM, 1]) == 0
    assert runner.run([*SYSTEM, 2]) == len(SYSTEM)
    runner.memory.forget(0)
    assert runner.run([*SYSTEM, 3]) == 0
    assert runner.run([*SYSTEM, 4]) == len(SYSTEM)


def test_a_few_common_tokens_do_not_push_a_long_prompt_out_of_its_slot() -> None:
    """The beginning-of-text token is common to all."""
    runner = Runner(Tokens(), slots=2)
    runner.run([0, *SYSTEM])
    assert runner.run([0, 1, 2]) == 0
    assert (runner.run([0, *SYSTEM]), runner.cache.saved_bytes) == (len(SYSTEM), 0)


def test_two_prompts_with_a_common_beginning_share_it_in_two_slots() -> None:
    runner = Runner(Tokens(), slots=2)
    first, second = [*SYSTEM, 1, *SYSTEM], [*SYSTEM, 2, *SYSTEM]
    assert [runner.run(first), runner.run(second)] == [0, len(SYSTEM)]
    assert [runner.run(first), runner.run(second)] == [len(first) - 1, len(second) - 1]
    assert runner.cache.saved_bytes == 0


FAULTS = {"no memory": True, "cannot save": True, "cannot load": False, "loads too little": False}
"""Of a move, and whether what the other slot held is kept then."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_move_that_fails_leaves_the_sequence_where_it_is(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, sequences = three_with_a_gap()
    memory = runner.memory
    sequence, slot = next_move(runner)
    held = list(memory.slots[sequence.slot])

    def load(slot: int, state: SavedState) -> bool:
        memory.slots[slot] = held[:-1]
        return fault != "cannot load"

    with monkeypatch.context() as patched:
        if fault == "no memory":
            patched.setattr(memory, "state_bytes", lambda _: 0)
        elif fault == "cannot save":
            patched.setattr(memory, "save", lambda _: None)
        else:
            patched.setattr(memory, "load", load)
        assert not runner.cache.move(sequence, slot)
    assert memory.slots[sequence.slot] == held
    assert runner.run([1, *SYSTEM]) == (len(SYSTEM) if FAULTS[fault] else 0)
    runner.close_gaps()
    assert {sequences[0].slot, sequences[2].slot} in ({0, 1}, {1, 2})


def test_a_long_conversation_is_not_moved_for_a_sequence() -> None:
    runner, _ = three_with_a_gap(length=MOST_MOVED + 1)
    move = next_move(runner)
    before = dict(runner.memory.slots)
    assert not runner.cache.move(*move)
    assert runner.memory.slots == before


def test_a_few_tokens_of_a_long_sequence_are_not_copied() -> None:
    """It would be copied as a whole."""
    runner = Runner(Tokens(), slots=2, capacity=100_000)
    long = runner.add([*SYSTEM, *range(LONGEST_SOURCE * len(SYSTEM))])
    while long.remaining > 1:
        runner.step()
    assert runner.run([*SYSTEM, 1]) == 0
    runner.end(long)
    assert runner.run([*SYSTEM, 2, *SYSTEM]) == len(SYSTEM)


def three_with_a_gap(length: int = 0) -> tuple[Runner, list[Sequence]]:
    """Three sequences of which the middle one has ended; it had ``length`` tokens more."""
    runner = Runner(Tokens(), slots=3, capacity=100_000)
    prompts: list[list[int]] = [[0, *SYSTEM], [1, *SYSTEM, *range(length)], [2, *SYSTEM]]
    sequences = [runner.add(prompt) for prompt in prompts]
    while not all(sequence.remaining == 1 for sequence in sequences):
        runner.step()
    runner.end(sequences[1])
    return runner, sequences


def next_move(runner: Runner) -> tuple[Sequence, int]:
    move = runner.scheduler.next_move(MOST_MOVED)
    assert move is not None
    return move


def test_a_call_that_fails_leaves_no_slot_in_disorder() -> None:
    """Its sequence is refused, and the next finds an empty slot."""
    memory = Tokens()
    runner = Runner(memory, slots=1)
    runner.run([1, *SYSTEM])

    def fail(slot: int) -> SavedState:
        raise MemoryError

    memory.save, save = fail, memory.save  # type: ignore[method-assign]
    refused = runner.add([2, *SYSTEM])
    with pytest.raises(MemoryError):
        runner.admit()
    runner.end(refused)
    memory.save = save  # type: ignore[method-assign]
    assert runner.run([3, *SYSTEM]) == 0
    assert runner.run([3, *SYSTEM]) == len(SYSTEM)


def test_a_common_prefix_is_counted() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([1, 9, 3], [1, 2, 3]) == 1
    assert common_prefix([5, *range(100)], [6, *range(100)]) == 0


class Reusing(RuleBasedStateMachine):
    """Prompts with shared beginnings, ends, aborts and growth in any order: a slot never holds
    anything but what its sequence has computed."""

    @initialize(
        slots=some.integers(1, 4),
        can_copy=some.booleans(),
        is_recurrent=some.booleans(),
        window=some.sampled_from([0, 0, 70, 150]),
        capacity=some.sampled_from([0, 300, 5000]),
    )
    def start(
        self, slots: int, can_copy: bool, is_recurrent: bool, window: int, capacity: int
    ) -> None:
        memory = Tokens(can_copy and not is_recurrent, is_recurrent, window)
        self.capacity = capacity
        self.runner = Runner(memory, slots, capacity)
        self.unfinished: list[Sequence] = []

    @rule(
        beginning=some.integers(0, 3),
        length=some.sampled_from([1, 2, 63, 64, 65, 150, 300]),
        end=some.integers(0, 3),
        owner=some.sampled_from(["us", "them"]),
        is_cold=some.booleans(),
    )
    def arrive(self, beginning: int, length: int, end: int, owner: str, is_cold: bool) -> None:
        sequence = self.runner.add([beginning, *range(length), end], owner)
        sequence.is_cold = is_cold
        self.unfinished.append(sequence)

    @rule(count=some.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.runner.step()

    @rule()
    def idle(self) -> None:
        self.runner.save_ahead()

    @rule(slot=some.integers(0, 3))
    def forget(self, slot: int) -> None:
        self.runner.memory.forget(slot)

    @precondition(lambda self: self.unfinished)
    @rule(data=some.data())
    def end(self, data: some.DataObject) -> None:
        sequence = data.draw(some.sampled_from(self.unfinished))
        self.unfinished.remove(sequence)
        self.runner.end(sequence)

    @rule(more=some.integers(1, 3))
    def grow(self, more: int) -> None:
        self.runner.slots += more
        self.runner.scheduler.grow(self.runner.slots)

    @invariant()
    def slots_hold_what_their_sequences_have_computed(self) -> None:
        for sequence in self.runner.scheduler.running:
            held = self.runner.memory.slots.get(sequence.slot, [])
            assert held == sequence.tokens[: sequence.position]
        for slot, prefix in self.runner.cache._left.items():
            assert prefix.slot == slot
            assert self.runner.memory.slots[slot] == prefix.tokens
        assert self.runner.cache.saved_bytes <= self.capacity


TestReusing = Reusing.TestCase
TestReusing.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
