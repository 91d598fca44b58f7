"""Which sequences get a slot, and what is in the next batch: policy only, no runtime."""

from collections import deque
from collections.abc import Iterator
from math import inf
from operator import attrgetter
from statistics import median
from typing import Generic, NamedTuple, TypeVar

from services.inferer.engine.sequence import Sequence, State
from services.inferer.engine.speculation import Speculation
from services.inferer.engine.step_times import StepTimes
from shared.prompts_first import PROMPTS_FIRST_S

MAX_PAUSE_S = 0.2
"""How long prompts hold up the next tokens of others, or a step's time if that is longer. Shorter
chunks cost too much: the weights are read for each (decision 11)."""
RECENT_STEPS = 5
"""Speeds are medians of so many: one during which the machine slept does not matter."""
LEAST_MEASURED = 8
"""The time per prompt token is learned only from steps with at least this many of them, unless
fewer are all that a step may have."""
FIRST_CHUNK = 16
"""Tokens, before anything has been measured."""
LEAST_PART = 32
"""The fewest tokens of a prompt that are added to a batch after another prompt, unless they are its
last ones. llama.cpp reads all weights once more for each part of another length."""
BACKGROUND_S, MOST_BACKGROUND_S = 0.5, 2.0
"""How long a chunk takes that is computed in the background, and at most: no answer waits for it,
but other prompts do."""
EFFICIENT_CHUNK = 64
"""Tokens. It takes `MOST_BACKGROUND_S` rather than have fewer: llama.cpp's flash attention computes
fewer one by one on a CPU, which takes three times as long where much is in the context."""
TURN_S = 0.2
"""How long the sequences of one adapter are computed while those of another wait. A change takes
about half the time of a token, which is to be little of it (decision 49)."""
TOGETHER = 8
"""Other batches between two that have one sequence only, for which all others wait."""

S = TypeVar("S", bound=Sequence)
S_co = TypeVar("S_co", bound=Sequence, covariant=True)


class Chunk(NamedTuple, Generic[S_co]):
    """The next ``size`` remaining tokens of one sequence."""

    sequence: S_co
    size: int
    has_output: bool
    """Whether these are all its remaining tokens, so that the model's output after the last one is
    wanted."""
    draft: list[int]
    """Guesses of the tokens that follow. The model's output is wanted after each of them, too."""


class PromptShare:
    """How many tokens of prompts a batch takes beside sequences that generate: as many as are
    computed in `MAX_PAUSE_S`, or in the time of a token of each of those if that is longer. Not in
    every batch: over time, prompts get half of it. Or they are computed in the background, with
    half of the threads."""

    def __init__(self) -> None:
        self._step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        """Of steps without prompts and drafts."""
        self._token_s: deque[float] = deque(maxlen=RECENT_STEPS)
        """For each token of a prompt."""
        self._background_s: deque[float] = deque(maxlen=RECENT_STEPS)
        """The same in the background."""
        self._least_measured = LEAST_MEASURED
        self._credit_s = PROMPTS_FIRST_S
        """How much time prompts have had less than the others; negative if more."""

    @property
    def is_used_up(self) -> bool:
        """Whether prompts have had their half of the time, and more."""
        return self._credit_s < 0

    def is_exceeded_by(self, tokens: int) -> bool:
        """Whether a prompt of so many would take more time than prompts may be ahead."""
        return bool(self._token_s) and tokens * median(self._token_s) > PROMPTS_FIRST_S

    def tokens(self, turns: int) -> int:
        """How many tokens of prompts the next batch takes, if any sequence generates. A token of
        each of those takes so many ``turns`` (batches)."""
        if self.is_used_up:
            return 0
        if not self._token_s:
            return FIRST_CHUNK
        step_s = median(self._step_s) if self._step_s else 0.0
        most = max(1, round(max(MAX_PAUSE_S, turns * step_s) / median(self._token_s)))
        self._least_measured = min(most, LEAST_MEASURED)
        return most

    def observe(
        self, generating: int, prompt_tokens: int, seconds: float, *, has_drafts: bool = False
    ) -> None:
        """Learn from a step with ``generating`` sequences and tokens of prompts."""
        if not prompt_tokens and not has_drafts:
            self._step_s.append(seconds)
        prompt_s = 0.0
        if prompt_tokens:
            step_s = median(self._step_s) if generating and self._step_s else 0.0
            prompt_s = max(seconds - step_s, 0.0)
        if prompt_tokens >= self._least_measured and prompt_s:
            self._token_s.append(prompt_s / prompt_tokens)
        if generating:
            credit_s = self._credit_s + (seconds - prompt_s) - prompt_s
            self._credit_s = min(max(credit_s, -PROMPTS_FIRST_S), PROMPTS_FIRST_S)
        else:  # they held nobody up
            self._credit_s = max(self._credit_s, 0.0)

    @property
    def background_tokens(self) -> int:
        """How many tokens of a prompt are computed at once in the background."""
        if self._background_s:
            token_s = median(self._background_s)
        elif self._token_s:
            token_s = 2 * median(self._token_s)  # with half of the threads
        else:
            return FIRST_CHUNK
        tokens, most = round(BACKGROUND_S / token_s), round(MOST_BACKGROUND_S / token_s)
        return max(tokens, min(EFFICIENT_CHUNK, most), 1)

    def observe_background(self, tokens: int, seconds: float) -> None:
        """Learn from so many that were computed in the background."""
        if tokens >= min(LEAST_MEASURED, self.background_tokens) and seconds:
            self._background_s.append(seconds / tokens)


class Scheduler(Generic[S]):
    """Runs up to ``slots`` sequences at a time; more wait in the order in which they came.

    A batch has at most ``batch_tokens`` tokens. First come sequences that generate. Prompts get the
    rest, or, beside sequences that generate, a share of the time (`PromptShare`). A prompt that
    takes longer, or comes when that is used up, may be computed in the background, on some of the
    threads, while batches go on without prompts. A prompt that does not fit is continued in a later
    batch. Prompts are in the order in which they would be done if each were computed alone from the
    time its sequence got a slot: shorter ones before longer ones, though shorter ones that keep
    coming cannot starve a longer one. A batch without prompts checks drafts of sequences that
    generate, where that pays (`Speculation`). A few such batches a minute have one sequence only,
    to measure how long it takes alone: everything else is compared with that. All sequences of a
    batch have the same adapter; where several are in use, they take turns (`TURN_S`). If more
    sequences generate than a batch may have, the oldest are in each one, and the others take turns
    in its last place. Not thread-safe: the compute thread owns it.
    """

    def __init__(
        self, slots: int, batch_tokens: int, speculation: Speculation | None = None
    ) -> None:
        self._batch_tokens = batch_tokens
        self._slots = slots
        self.free_slots = list(range(slots))
        """To be read only."""
        self.step_times = StepTimes()
        self._waiting: deque[S] = deque()
        self._running: list[S] = []
        """In the order in which they got their slots."""
        self._share = PromptShare()
        self._speculation = speculation or Speculation()
        self._clock = 0
        """Tokens of prompts that were computed so far."""
        self._adapters: list[str] = []
        """Those in use, in the order of their turns."""
        self._turn_s = 0.0
        """How long the first of them has had its turn."""
        self._in_background: S | None = None
        """The one that has a chunk of its prompt computed in the background."""
        self._is_alone = False
        """Whether the current batch has one sequence of several, to measure how long it takes."""
        self._batches_together = 0
        """Since the last one like that."""
        self._generating = 0
        """How many sequences generate, including those whose turn comes after the current batch. 1
        if one is alone."""
        self._turns = 1
        """How many batches it takes until each of them has had a token."""
        self._batches = 0
        """That were computed."""
        self._held_up = 0
        """How many more batches until all of them have had a token since the last one with prompts
        began; 0 or less if all have. Until then no batch has prompts: they would hold up the same
        sequences once more."""
        self._generated = 0
        """What that was for the last batch, if it had all threads and no prompts. The first step of
        another number is slow: a job has just ended, and the next one is being prepared."""

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
        sequence.uncached = sequence.remaining
        sequence.due = self._clock + sequence.uncached
        self.free_slots.remove(slot)
        self._running.append(sequence)

    def next_move(self, most: int) -> tuple[S, int] | None:
        """A sequence that has at most ``most`` tokens in the context, and a free slot that it
        should have instead of its own, so that the slots of all that run are adjacent. None if they
        are, or cannot be."""
        size = len(self._running)
        if size < 2:
            return None
        slots = [sequence.slot for sequence in self._running]
        if max(slots) - min(slots) < size:
            return None

        def tokens(first: int) -> int:
            running = self._running
            return sum(one.position for one in running if first <= one.slot < first + size)

        # Where the fewest tokens have to be moved.
        first = max(range(self._slots - size + 1), key=tokens)
        wanted = range(first, first + size)
        outside = [sequence for sequence in self._running if sequence.slot not in wanted]
        sequence = min(outside, key=_position)
        if sequence.position > most:
            return None
        return sequence, next(slot for slot in self.free_slots if slot in wanted)

    def move(self, sequence: S, slot: int) -> None:
        """Give a sequence that runs another slot, a free one, which has the same tokens."""
        self.free_slots.remove(slot)
        self.free_slots.append(sequence.slot)
        sequence.slot = slot

    def next_in_background(self) -> Chunk[S] | None:
        """A chunk of a prompt that is to be computed in the background of the next batches, with
        half of the threads; None if there should be none. Call `complete_in_background` once it is
        computed, or `drop_background` if it was not."""
        if self._in_background is not None:
            return None
        in_turn = self._in_turn()
        prompts = [one for one in in_turn if one.remaining > 1]
        if not 0 < len(prompts) < len(in_turn):
            return None
        sequence = min(prompts, key=_due)
        if not (self._share.is_used_up or self._share.is_exceeded_by(sequence.uncached)):
            return None
        self._in_background = sequence
        most = min(self._share.background_tokens, self._batch_tokens)
        size = self._size(sequence, most)
        return Chunk(sequence, size, size == sequence.remaining, [])

    def complete_in_background(self, chunk: Chunk[S], seconds: float) -> None:
        """Note that ``chunk``, the one of `next_in_background`, was computed, in ``seconds``. If it
        has an output, its sequence needs another token, or must be removed, before the next
        batch."""
        sequence, size, _, _ = chunk
        self.drop_background()
        self._share.observe_background(size, seconds)
        self._clock += size
        sequence.position += size
        # With all threads it would have taken about half of the time.
        sequence.delay_s += seconds / 2

    def drop_background(self) -> None:
        """Nothing is computed in the background any more."""
        self._in_background = None

    def next_batch(self, at_once: int | None = None) -> list[Chunk[S]]:
        """What is to be computed next; empty if no sequence has a slot. Call `complete` once it is
        computed, or `next_batch` again if nothing of it was. While a prompt is computed in the
        background, it has no others. ``at_once`` is how many sequences are computed at the same
        time. The batch has at most so many that generate, and at most so many prompts: with more,
        the outputs of the first would wait for the others."""
        batch: list[Chunk[S]] = []
        in_turn = self._in_turn()
        prompts: list[S] = []
        if self._in_background is None:
            prompts = sorted((one for one in in_turn if one.remaining > 1), key=_due)
        generating = [one for one in in_turn if one.remaining == 1]
        self._generating = len(generating)
        most = min(at_once or self._batch_tokens, self._batch_tokens)
        self._turns = max(self._generating - most + 1, 1)
        if self._turns > 1:
            generating = [*generating[: most - 1], min(generating[most - 1 :], key=_turn)]
        room = self._batch_tokens - len(generating)
        share = 0
        if prompts and not generating:
            share = room
        elif prompts and self._held_up <= 0:
            share = min(room, self._share.tokens(self._turns))
        self._is_alone = (
            self._generating > 1
            and not share
            and self._in_background is None
            and self._batches_together >= TOGETHER
            and self.step_times.is_due(1)
        )
        if self._is_alone:
            generating, self._generating = generating[:1], 1
        # Their time could not be measured.
        has_drafts = not (share or self._is_alone or self._in_background)
        room_for_drafts = room if has_drafts else 0
        drafts = self._speculation.counts(generating, room_for_drafts)
        rows = 0
        for sequence, count in zip(generating, drafts, strict=True):
            batch.append(Chunk(sequence, 1, True, sequence.draft[:count]))
            rows += 1 + count
        first, end = rows, rows + share
        for sequence in prompts[:at_once]:
            left = end - rows
            if not left:
                break
            if rows > first and left < min(sequence.remaining, LEAST_PART):
                continue
            size = self._size(sequence, left)
            rows += size
            batch.append(Chunk(sequence, size, size == sequence.remaining, []))
        return batch

    def _size(self, sequence: S, most: int) -> int:
        """Of the next chunk of a prompt, at most ``most``."""
        size = min(sequence.remaining, most)
        if sequence.position < sequence.checkpoint:
            size = min(size, sequence.checkpoint - sequence.position)
        return size

    def _in_turn(self) -> list[S]:
        """The sequences with a slot that may be in the next batch: those of one adapter."""
        running = self._running
        if self._in_background is not None:
            running = [one for one in running if one is not self._in_background]
        used = dict.fromkeys(map(_adapter, running))
        if len(used) == 1 and self._adapters == [*used]:
            return running  # as nearly always
        first = self._adapters[:1]
        self._adapters = [one for one in self._adapters if one in used]
        self._adapters += [one for one in used if one not in self._adapters]
        if len(self._adapters) > 1 and self._adapters[:1] == first and self._turn_s >= TURN_S:
            self._adapters.append(self._adapters.pop(0))
        if self._adapters[:1] != first:
            self._turn_s = 0.0
        return [one for one in running if one.adapter in self._adapters[:1]]

    def complete(self, batch: list[Chunk[S]], seconds: float) -> list[Chunk[S]]:
        """Note that ``batch`` was computed, in ``seconds``. Returns the chunks with an output: each
        of their sequences needs another token, or must be removed, before the next batch. The
        ``position`` of a sequence does not include its draft."""
        generated: list[S] = []
        prompt_tokens = drafts = 0
        for sequence, size, _, draft in batch:
            if sequence.remaining == 1:
                generated.append(sequence)
                drafts += len(draft)
            else:
                prompt_tokens += size
        self._batches_together = 0 if self._is_alone else self._batches_together + 1
        # While some of the threads compute something else, a step takes longer.
        has_background = self._in_background is not None
        if not self._is_alone and not has_background:
            self._share.observe(len(generated), prompt_tokens, seconds, has_drafts=drafts > 0)
        if generated and not prompt_tokens and not has_background:
            self._speculation.observe(len(generated), drafts, seconds)
            if not drafts and (self._is_alone or self._generating == self._generated):
                self.step_times.observe(len(generated), seconds)
        self._generated = 0 if prompt_tokens or has_background else self._generating
        if prompt_tokens:
            self._held_up = self._turns
        if not self._is_alone:
            self._held_up -= 1
        self._turn_s += seconds
        if len(self._running) > 1:
            self._add_delays(batch, len(generated), prompt_tokens, seconds)
        self._batches += 1
        for sequence in generated:
            sequence.turn = self._batches
        self._clock += prompt_tokens
        for sequence, size, _, _ in batch:
            sequence.position += size
        return [chunk for chunk in batch if chunk.has_output]

    def _add_delays(
        self, batch: list[Chunk[S]], generated: int, prompt_tokens: int, seconds: float
    ) -> None:
        """Note how much longer each sequence has taken than it would have taken alone."""
        generating_s = alone_s = 0.0
        if generated:
            is_slower = prompt_tokens > 0 or self._in_background is not None
            step_s = self.step_times.estimate(generated) if is_slower else inf
            generating_s = min(step_s, seconds)
            alone_s = generating_s / self.step_times.slowdown(generated)
        prompts_s = seconds - generating_s
        for sequence in self._running:
            if sequence is not self._in_background:
                sequence.delay_s += seconds
        for sequence, size, _, _ in batch:
            if sequence.remaining == 1:
                sequence.delay_s -= alone_s
            else:
                sequence.delay_s -= prompts_s * size / prompt_tokens

    def remove(self, sequence: S) -> None:
        """Forget a sequence, which may have a slot or wait for one."""
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self.free_slots.append(sequence.slot)
        else:
            self._waiting.remove(sequence)
        self._speculation.learn(sequence)
        sequence.state = State.FINISHED

    def grow(self, slots: int) -> None:
        """Have ``slots`` slots, more than before."""
        self.free_slots += range(self._slots, slots)
        self._slots = slots


_adapter = attrgetter("adapter")
_due = attrgetter("due")
_position = attrgetter("position")
_turn = attrgetter("turn")
