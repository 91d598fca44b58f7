"""Which sequences share a batch, without a model: what follows from the scheduler alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.inferer.engine.scheduler import (
    BACKGROUND_S,
    EFFICIENT_CHUNK,
    LEAST_MEASURED,
    MAX_PAUSE_S,
    MOST_BACKGROUND_S,
    RECENT_STEPS,
    TOGETHER,
    TURN_S,
    Chunk,
    Scheduler,
)
from services.inferer.engine.sequence import Sequence, State
from services.inferer.engine.speculation import MAX_DRAFTS, Speculation
from services.inferer.engine.step_times import ENOUGH, REFRESH_S, StepTimes
from shared.prompts_first import PROMPTS_FIRST_S
from tests.support.clocks import Clock

BATCH_TOKENS = 4
WRONG = -1
MAX_BATCHES = 2000
"""Far more than the work of one case takes."""


class Work(Sequence):
    """A prompt, and an answer of so many tokens; each token is its own position. ``right_guesses``
    says which tokens of each draft are right."""

    def __init__(
        self,
        prompt_tokens: int,
        answer_tokens: int = 1,
        right_guesses: tuple[bool, ...] = (),
        adapter: str = "",
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.prompt_tokens = prompt_tokens
        self.length = prompt_tokens + answer_tokens - 1
        """Tokens that are computed: the last one of an answer is not."""
        self.tokens += range(prompt_tokens)
        self.computed: list[int] = []
        self.right_guesses = right_guesses
        self.streak = 20

    @property
    def is_generating(self) -> bool:
        return self.position >= self.prompt_tokens

    def advance(self, draft: list[int]) -> None:
        """Take the next token, and one more for each right token that ``draft`` begins with; none
        after the end of the answer."""
        for token in [*draft, WRONG]:
            if self.position == self.length:
                break
            self.tokens.append(self.position)
            if token != self.position:
                break
            self.computed.append(token)
            self.position += 1
        self.draft = [
            position if is_right else WRONG
            for position, is_right in enumerate(self.right_guesses, len(self.tokens))
        ]


def scheduler_of(works: Iterable[Work], slots: int) -> Scheduler[Work]:
    scheduler: Scheduler[Work] = Scheduler(slots, BATCH_TOKENS)
    scheduler.step_times = StepTimes(lambda: 0.0)  # whatever the machine has to do meanwhile
    for work in works:
        scheduler.add(work)
    return scheduler


def measured_alone(slots: int) -> Scheduler[Work]:
    """One that knows how long a step of one sequence takes."""
    scheduler = scheduler_of([Work(1, 20)], slots)
    while not scheduler.is_idle:
        compute(scheduler)
    return scheduler


def admit(scheduler: Scheduler[Work]) -> list[Work]:
    """Give the free slots to those who wait; the works that got one."""
    admitted = []
    while (work := scheduler.next_waiting) is not None:
        scheduler.admit(scheduler.free_slots[-1])
        admitted.append(work)
    return admitted


def seconds_of(batch: list[Chunk[Work]], token_s: float = 0.003) -> float:
    """How long a model takes that reads its weights in 9 ms, and computes a token in 3 ms."""
    return 0.009 + token_s * (sum(chunk.size + len(chunk.draft) for chunk in batch) - 1)


def compute(
    scheduler: Scheduler[Work],
    scale: float = 1.0,
    token_s: float = 0.003,
    at_once: int | None = None,
) -> list[Chunk[Work]]:
    """The engine's step without the model; ``scale`` is by how much the model is slower."""
    admit(scheduler)
    batch = scheduler.next_batch(at_once)
    for work, size, *_ in batch:
        work.computed += work.tokens[work.position :][:size]
    for chunk in scheduler.complete(batch, scale * seconds_of(batch, token_s)):
        chunk.sequence.advance(chunk.draft)
        if chunk.sequence.remaining == 0:
            scheduler.remove(chunk.sequence)
    return batch


def sizes(batch: list[Chunk[Work]]) -> dict[Work, int]:
    return {chunk.sequence: chunk.size for chunk in batch}


def test_the_first_step_of_another_number_is_not_measured() -> None:
    """A job has just ended then, and the next one is being prepared, which takes the CPU."""
    scheduler = scheduler_of([], slots=2)
    for _ in range(ENOUGH):
        for answer_tokens in (3, 4):  # both, both, one
            scheduler.add(Work(1, answer_tokens))
        while not scheduler.is_idle:
            compute(scheduler)
    assert list(scheduler.step_times.seconds) == [2]
    scheduler.add(Work(1, ENOUGH + 2))
    while not scheduler.is_idle:
        compute(scheduler)
    assert list(scheduler.step_times.seconds) == [2, 1]


def test_the_first_step_after_a_prompt_is_not_measured() -> None:
    scheduler = scheduler_of([Work(1, 20)], slots=2)
    compute(scheduler)
    for _ in range(ENOUGH):
        scheduler.add(Work(2, 1))
        for _ in range(2):  # the prompt beside a token, a token
            compute(scheduler)
    assert not scheduler.step_times.seconds


def test_a_prompt_longer_than_a_batch_is_split() -> None:
    """Every token once and in order; an output only after the last one."""
    work = Work(2 * BATCH_TOKENS + 3)
    scheduler = scheduler_of([work], slots=1)
    batches = [compute(scheduler) for _ in range(3)]
    assert [[chunk[1:] for chunk in batch] for batch in batches] == [
        [(BATCH_TOKENS, False, [])],
        [(BATCH_TOKENS, False, [])],
        [(3, True, [])],
    ]
    assert work.computed == list(range(work.length))
    assert scheduler.is_idle


def test_a_few_tokens_of_another_prompt_are_not_worth_a_part() -> None:
    """llama.cpp computes parts of different lengths one after another."""
    first, long, short = Work(LARGE_BATCH - 10), Work(LARGE_BATCH + 1), Work(LARGE_BATCH)
    scheduler: Scheduler[Work] = Scheduler(3, LARGE_BATCH)
    for work in (first, long, short):
        scheduler.add(work)
    batches = [sizes(compute(scheduler)) for _ in range(4)]
    assert batches == [
        {first: LARGE_BATCH - 10},
        {short: LARGE_BATCH},
        {long: LARGE_BATCH},
        {long: 1},
    ]


def test_the_rest_of_a_prompt_is_computed_after_another_one() -> None:
    first, rest = Work(LARGE_BATCH - 10), Work(10)
    scheduler: Scheduler[Work] = Scheduler(2, LARGE_BATCH)
    for work in (first, rest):
        scheduler.add(work)
    assert sizes(compute(scheduler)) == {first: LARGE_BATCH - 10, rest: 10}


def test_generation_comes_before_prompts_and_short_prompts_before_long_ones() -> None:
    """A sequence that generates is in every batch; prompts share the rest, in their turn."""
    generating, long, short = Work(1, 10), Work(30), Work(2)
    scheduler = scheduler_of([long, generating, short], slots=3)
    assert sizes(compute(scheduler)) == {generating: 1, short: 2}
    batches = [sizes(compute(scheduler)) for _ in range(6)]
    assert all(generating in batch for batch in batches)
    assert {generating: 1, long: 3} in batches


LARGE_BATCH = 128


@dataclass
class Shared:
    """A prompt beside a sequence that generates, with `seconds_of` for a model."""

    prompt_s: float
    """Until the prompt was computed, on its own and beside the other."""
    alone_s: float
    speed: float
    """Of the other meanwhile: tokens in the time of a token alone."""
    longest_pause_s: float


def share(prompt_tokens: int, scale: float = 1.0) -> Shared:
    scheduler: Scheduler[Work] = Scheduler(2, LARGE_BATCH)
    generating, prompt = Work(1, 10**6), Work(prompt_tokens)
    scheduler.add(generating)
    for _ in range(20):
        compute(scheduler)
    scheduler.add(prompt)
    steps = []
    while prompt.state is not State.FINISHED:
        steps.append(scale * seconds_of(compute(scheduler, scale)))
    alone = [min(LARGE_BATCH, prompt_tokens - at) for at in range(0, prompt_tokens, LARGE_BATCH)]
    return Shared(
        prompt_s=sum(steps),
        alone_s=sum(scale * (0.009 + 0.003 * (size - 1)) for size in alone),
        speed=len(steps) * scale * 0.009 / sum(steps),
        longest_pause_s=max(steps[1:]),
    )


def test_a_long_prompt_and_a_stream_have_half_of_the_time_each() -> None:
    """On a small model, whose steps are short."""
    shared = share(7000)
    assert shared.speed > 0.45
    assert shared.prompt_s < 2.3 * shared.alone_s
    assert shared.longest_pause_s < MAX_PAUSE_S + 0.02


def test_prompts_that_come_together_are_computed_at_once() -> None:
    """In batches that still have a token of the stream every 200 ms. If more keep coming, they get
    half of the time."""
    scheduler: Scheduler[Work] = Scheduler(8, LARGE_BATCH)
    stream = Work(1, 10**6)
    scheduler.add(stream)
    compute(scheduler)
    prompts = [Work(80) for _ in range(4)]
    for prompt in prompts:
        scheduler.add(prompt)
    batches = []
    while any(prompt.state is not State.FINISHED for prompt in prompts):
        batches.append(compute(scheduler))
    assert all(len(batch) > 1 and stream in sizes(batch) for batch in batches)
    assert max(seconds_of(batch) for batch in batches[1:]) < MAX_PAUSE_S + 0.02
    for _ in range(20):
        prompt = Work(80)
        scheduler.add(prompt)
        while prompt.state is not State.FINISHED:
            batches.append(compute(scheduler))
    took_s = sum(seconds_of(batch) for batch in batches)
    assert 0.4 < len(batches) * seconds_of([Chunk(stream, 1, True, [])]) / took_s < 0.5


def beside_a_stream(*prompts: Work) -> tuple[Scheduler[Work], Work]:
    """``prompts`` and a stream, when prompts have had their share of the time."""
    scheduler: Scheduler[Work] = Scheduler(1 + len(prompts), LARGE_BATCH)
    stream = Work(1, 10**6)
    scheduler.add(stream)
    for _ in range(20):
        compute(scheduler)
    short = Work(60)
    scheduler.add(short)
    admit(scheduler)
    while scheduler.next_in_background() is None:
        assert short in sizes(compute(scheduler))
        if short.state is State.FINISHED:
            short = Work(60)
            scheduler.add(short)
            admit(scheduler)
    scheduler.drop_background()
    scheduler.remove(short)
    for prompt in prompts:
        scheduler.add(prompt)
    admit(scheduler)
    return scheduler, stream


def complete_in_background(scheduler: Scheduler[Work], chunk: Chunk[Work], token_s: float) -> None:
    work, size, has_output, _ = chunk
    work.computed += work.tokens[work.position :][:size]
    scheduler.complete_in_background(chunk, size * token_s)
    if has_output:
        work.advance([])
        if work.remaining == 0:
            scheduler.remove(work)


def test_a_long_prompt_goes_on_in_the_background() -> None:
    """When it has had its share, no batch has a part of it, until it is done."""
    prompt = Work(2000, 2)
    scheduler, stream = beside_a_stream(prompt)
    chunks = []
    while chunk := scheduler.next_in_background():
        assert chunk.sequence is prompt
        assert scheduler.next_in_background() is None, "one at a time"
        assert all(sizes(compute(scheduler)) == {stream: 1} for _ in range(5))
        complete_in_background(scheduler, chunk, token_s=0.005)
        chunks.append(chunk)
    assert prompt.is_generating
    assert [chunk.has_output for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.size for chunk in chunks[1:-1]} == {round(BACKGROUND_S / 0.005)}
    assert sizes(compute(scheduler)) == {stream: 1, prompt: 1}
    assert prompt.computed == list(range(prompt.length))


def test_a_prompt_that_takes_longer_is_in_the_background_from_beginning_to_end() -> None:
    """Once it is known how fast prompts are computed. A shorter one is not."""
    scheduler: Scheduler[Work] = Scheduler(4, LARGE_BATCH)
    scheduler.add(Work(100))
    compute(scheduler)
    stream = Work(1, 10**6)
    scheduler.add(stream)
    for _ in range(400):
        compute(scheduler)
    limit = round(PROMPTS_FIRST_S / 0.003)
    long, short = Work(limit + 20), Work(limit - 20)
    scheduler.add(long)
    admit(scheduler)
    while chunk := scheduler.next_in_background():
        assert sizes(compute(scheduler)) == {stream: 1}
        complete_in_background(scheduler, chunk, token_s=0.006)
    assert long.state is State.FINISHED
    scheduler.add(short)
    admit(scheduler)
    assert scheduler.next_in_background() is None
    assert short in sizes(compute(scheduler))


@pytest.mark.parametrize(
    ("token_s", "size"),
    [
        (0.001, LARGE_BATCH),
        (0.005, round(BACKGROUND_S / 0.005)),
        (0.02, EFFICIENT_CHUNK),
        (0.1, round(MOST_BACKGROUND_S / 0.1)),
        (10.0, 1),
    ],
)
def test_the_size_of_chunks_in_the_background(token_s: float, size: int) -> None:
    """A time that other prompts can wait for; longer rather than inefficient, but not for ever."""
    prompt = Work(5000)
    scheduler, _ = beside_a_stream(prompt)
    for number in range(8):
        chunk = scheduler.next_in_background()
        assert chunk is not None
        if number:
            assert chunk.size == size
        else:  # as fast as with all threads, but with half of them
            assert chunk.size == pytest.approx(BACKGROUND_S / (2 * 0.003), abs=1)
        complete_in_background(scheduler, chunk, token_s)


def test_a_slow_chunk_does_not_make_those_in_the_background_small_for_ever() -> None:
    """The machine was paused during it, and nothing else has been measured."""
    prompt = Work(10**5)
    scheduler, _ = beside_a_stream(prompt)
    for token_s in [100.0] + [0.005] * RECENT_STEPS:
        chunk = scheduler.next_in_background()
        assert chunk is not None
        complete_in_background(scheduler, chunk, token_s)
    chunk = scheduler.next_in_background()
    assert chunk is not None
    assert chunk.size == round(BACKGROUND_S / 0.005)


def test_a_slow_batch_does_not_make_the_parts_of_prompts_small_for_ever() -> None:
    """The machine was paused during it, and an answer is always generated."""
    stream, prompt = Work(1, 10**6), Work(10**5)
    scheduler: Scheduler[Work] = Scheduler(2, LARGE_BATCH)
    scheduler.add(stream)
    compute(scheduler)
    scheduler.add(prompt)
    compute(scheduler, scale=10**4)
    for _ in range(2000):
        compute(scheduler)
    assert max(sizes(compute(scheduler)).get(prompt, 0) for _ in range(100)) > LEAST_MEASURED


def test_another_adapter_has_its_turn_during_a_chunk_in_the_background() -> None:
    """Also if no other sequence has the adapter of the prompt any more."""
    prompt, other = Work(3000), Work(1, 1000, adapter="other")
    scheduler, stream = beside_a_stream(prompt)
    chunk = scheduler.next_in_background()
    assert chunk is not None
    scheduler.grow(3)
    scheduler.add(other)
    admit(scheduler)
    scheduler.remove(stream)
    for _ in range(50):
        assert sizes(compute(scheduler)) == {other: 1}
    complete_in_background(scheduler, chunk, token_s=0.005)
    computed: set[Work] = set()
    for _ in range(50):
        computed |= sizes(compute(scheduler)).keys()
    assert computed == {prompt, other}


def test_there_is_no_background_without_a_foreground() -> None:
    """When the stream ends, the prompt has all threads, once its chunk is done."""
    prompt = Work(3000)
    scheduler, stream = beside_a_stream(prompt)
    chunk = scheduler.next_in_background()
    assert chunk is not None
    scheduler.remove(stream)
    assert scheduler.next_batch() == []
    complete_in_background(scheduler, chunk, token_s=0.005)
    assert scheduler.next_in_background() is None
    assert sizes(scheduler.next_batch()) == {prompt: LARGE_BATCH}


def test_what_was_not_computed_in_the_background_is_repeated() -> None:
    prompt = Work(3000)
    scheduler, _ = beside_a_stream(prompt)
    chunk = scheduler.next_in_background()
    scheduler.drop_background()
    assert scheduler.next_in_background() == chunk


def test_a_shorter_prompt_comes_first_in_the_background() -> None:
    """After the chunk that is being computed."""
    long, short = Work(3000), Work(50)
    scheduler, _ = beside_a_stream(long, short)
    chunk = scheduler.next_in_background()
    assert chunk is not None
    assert chunk.sequence is short
    assert (chunk.size, chunk.has_output) == (50, True)


def test_a_chunk_in_the_background_ends_at_a_checkpoint() -> None:
    prompt = Work(3000)
    scheduler, _ = beside_a_stream(prompt)
    prompt.checkpoint = prompt.position + 10
    chunk = scheduler.next_in_background()
    assert chunk is not None
    assert chunk.size == 10


def test_steps_beside_the_background_are_not_measured() -> None:
    """They have only some of the threads. Nor do they have drafts, or a sequence alone."""
    prompt = Work(10**5)
    scheduler, stream = beside_a_stream(prompt)
    before = dict(scheduler.step_times.seconds)
    stream.right_guesses = (True,) * MAX_DRAFTS
    chunk = scheduler.next_in_background()
    assert chunk is not None
    for _ in range(200):
        assert [chunk.draft for chunk in compute(scheduler, scale=1.5)] == [[]]
    assert scheduler.step_times.seconds == before
    scheduler.drop_background()
    assert scheduler.next_in_background() is not None, "the share is still used up"
    scheduler.drop_background()
    for _ in range(5):
        compute(scheduler)
    assert [len(chunk.draft) for chunk in compute(scheduler)] != [0]


def test_what_the_background_costs_is_known() -> None:
    """A stream waits for nothing, but its steps take longer. The prompt has half of the threads."""
    prompt = Work(3000)
    scheduler, stream = beside_a_stream(prompt)
    before = stream.delay_s, prompt.delay_s
    chunk = scheduler.next_in_background()
    assert chunk is not None
    for _ in range(40):
        compute(scheduler, scale=1.5)
    assert stream.delay_s - before[0] == pytest.approx(40 * 0.5 * 0.009)
    complete_in_background(scheduler, chunk, token_s=0.01)
    assert prompt.delay_s - before[1] == pytest.approx(chunk.size * 0.01 / 2)


def test_only_so_many_prompts_are_in_a_batch() -> None:
    """Those that are due first; the others come next."""
    scheduler: Scheduler[Work] = Scheduler(4, batch_tokens=100)
    works = [Work(9) for _ in range(4)]
    for work in works:
        scheduler.add(work)
    assert sizes(compute(scheduler, at_once=2)) == dict.fromkeys(works[:2], 9)
    assert sizes(compute(scheduler, at_once=2)) == dict.fromkeys(works[2:], 9)


@pytest.mark.parametrize(
    ("running", "at_once"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, None), (6, 2 * BATCH_TOKENS)]
)
def test_the_youngest_take_turns_where_not_all_are_computed_at_once(
    running: int, at_once: int | None
) -> None:
    """Or where a batch has no room for a token of each. All others are in each batch."""
    scheduler = measured_alone(running)
    works = [Work(1, 100) for _ in range(running)]
    for work in works:
        scheduler.add(work)
    most = min(at_once or BATCH_TOKENS, BATCH_TOKENS)
    for _ in range(40):
        assert len(compute(scheduler, at_once=at_once)) == most
    tokens = [len(work.computed) for work in works]
    oldest, youngest = tokens[: most - 1], tokens[most - 1 :]
    assert oldest == [40] * (most - 1)
    assert max(youngest) - min(youngest) <= 1


def test_the_next_oldest_is_in_each_batch_when_one_has_ended() -> None:
    scheduler = measured_alone(4)
    works = [Work(1, tokens) for tokens in (20, 100, 100, 100)]
    for work in works:
        scheduler.add(work)
    while works[0].state is not State.FINISHED:
        compute(scheduler, at_once=2)
    before = [len(work.tokens) for work in works[1:]]
    for _ in range(20):
        compute(scheduler, at_once=2)
    after = [len(work.tokens) for work in works[1:]]
    assert [more - less for more, less in zip(after, before, strict=True)] == [20, 10, 10]


def test_times_where_sequences_take_turns() -> None:
    """With three sequences, of which two are computed at once, three tokens take one and a half
    batches. So does what each of them is delayed."""
    scheduler = measured_alone(3)
    works = [Work(1, 100) for _ in range(3)]
    for work in works:
        scheduler.add(work)
    for _ in range(30):
        compute(scheduler, at_once=2)
    alone_s, both_s = 0.009, 0.012
    assert scheduler.step_times.seconds == pytest.approx({1: alone_s, 2: both_s})
    slowdowns = scheduler.step_times.slowdowns(3, per_batch=2)
    assert slowdowns == pytest.approx([1, both_s / alone_s, 1.5 * both_s / alone_s])
    batches = 30
    for work in works:
        alone = (len(work.tokens) - 1) * alone_s
        assert work.delay_s == pytest.approx(batches * both_s - alone, rel=0.1)


def test_two_take_twice_as_long_where_one_is_computed_at_once() -> None:
    scheduler = scheduler_of([], 2)
    for _ in range(2):
        scheduler.add(Work(1, 10**6))
    for _ in range(2 * ENOUGH * TOGETHER):
        compute(scheduler, at_once=1)
    assert scheduler.step_times.slowdowns(2, per_batch=1) == pytest.approx([1, 2])


@pytest.mark.parametrize("scale", [1, 10])
def test_a_prompt_holds_up_sequences_that_take_turns_no_longer_than_others(scale: int) -> None:
    """And has half of the time, however long a token of each of them takes."""
    scheduler: Scheduler[Work] = Scheduler(7, LARGE_BATCH)
    streams = [Work(1, 10**6) for _ in range(6)]
    for stream in streams:
        scheduler.add(stream)
    for _ in range(200):
        compute(scheduler, scale, at_once=2)
    prompt = Work(7000)
    scheduler.add(prompt)
    now_s = longest_pause_s = 0.0
    last_s = dict.fromkeys(streams, 0.0)
    while prompt.state is not State.FINISHED:
        batch = compute(scheduler, scale, at_once=2)
        now_s += scale * seconds_of(batch)
        for stream in sizes(batch).keys() & {*streams}:
            longest_pause_s = max(longest_pause_s, now_s - last_s[stream])
            last_s[stream] = now_s
    # Five of the six take turns.
    round_s = scale * 5 * 0.012
    assert longest_pause_s < max(MAX_PAUSE_S, round_s) + 1.5 * round_s
    assert prompt.delay_s == pytest.approx(now_s / 2, rel=0.1)


def test_what_a_prompt_takes_beside_sequences_that_take_turns() -> None:
    """Of a batch, what is left after the tokens of these, if anything is."""
    scheduler = measured_alone(4)
    for _ in range(3):
        scheduler.add(Work(1, 10**6))
    for _ in range(30):
        compute(scheduler, at_once=2)
    prompt = Work(20)
    scheduler.add(prompt)
    assert sizes(compute(scheduler, at_once=2))[prompt] == 2
    assert prompt.delay_s == pytest.approx(0.012)
    took_s = seconds_of([Chunk(prompt, 4, False, [])])
    while prompt.state is not State.FINISHED:
        took_s += 0.1 * seconds_of(compute(scheduler, scale=0.1, at_once=2))
    assert prompt.delay_s < took_s


def test_on_a_large_model_a_prompt_holds_a_stream_up_for_one_step_more() -> None:
    """A step takes 270 ms there: chunks of 50 ms would be a single token."""
    shared = share(700, scale=30)
    assert shared.speed > 0.45
    assert shared.prompt_s < 2.3 * shared.alone_s
    assert shared.longest_pause_s < 2.5 * 30 * 0.009


def test_a_step_in_which_the_machine_slept_changes_little() -> None:
    scheduler: Scheduler[Work] = Scheduler(2, LARGE_BATCH)
    scheduler.add(Work(1, 10**6))
    for _ in range(20):
        compute(scheduler)
    prompt = Work(2000)
    scheduler.add(prompt)
    for _ in range(50):
        compute(scheduler)
    compute(scheduler, scale=1e6)
    before = prompt.position
    for _ in range(200):
        compute(scheduler)
    assert prompt.position > before + 200


def test_what_others_cost_a_sequence_is_known() -> None:
    """Alone nothing; beside another, the longer steps and the time that its prompt takes."""
    alone = Work(1, 20)
    scheduler = scheduler_of([alone], slots=2)
    took_s = sum(seconds_of(compute(scheduler)) for _ in range(20))
    assert alone.state is State.FINISHED
    assert alone.delay_s == 0

    pair = [Work(1, 40), Work(1, 40)]
    for work in pair:
        scheduler.add(work)
    took_s = sum(seconds_of(compute(scheduler)) for _ in range(40))
    for work in pair:
        assert work.state is State.FINISHED
        # 40 steps alone, measured before, take 9 ms each. The first few of two were not measured.
        assert abs((took_s - work.delay_s) - 40 * 0.009) < 0.1 * took_s

    pair = [Work(1, 40), Work(1, 40)]
    for work in pair:
        scheduler.add(work)
    for _ in range(20):
        compute(scheduler)
    before_s = pair[0].delay_s
    # A step that the machine slows down would have been as much slower alone.
    compute(scheduler, scale=10)
    assert pair[0].delay_s - before_s == pytest.approx(10 * (0.012 - 0.009))
    for work in pair:
        scheduler.remove(work)

    stream, prompt = Work(1, 400), Work(40)
    scheduler.add(stream)
    for _ in range(20):
        compute(scheduler)
    scheduler.add(prompt)
    together_s = 0.0
    while prompt.state is not State.FINISHED:
        together_s += seconds_of(compute(scheduler))
    # What one had the other had not, except that a step of two takes less than two steps.
    of_stream, of_prompt = together_s - stream.delay_s, together_s - prompt.delay_s
    assert 0 < of_prompt < 40 * 0.009
    assert 0 < of_stream < together_s
    assert of_stream + of_prompt <= together_s * 1.05


def test_slots_are_assigned_in_the_order_of_arrival() -> None:
    """Sequences beyond the slots wait; one that finishes or is aborted frees its slot."""
    works = [Work(1, answer) for answer in (1, 9, 9, 9)]
    scheduler = scheduler_of(works, slots=2)
    assert admit(scheduler) == works[:2]
    compute(scheduler)
    assert works[0].state is State.FINISHED
    assert admit(scheduler) == [works[2]]
    scheduler.remove(works[1])
    assert admit(scheduler) == [works[3]]
    assert admit(scheduler) == []


def test_a_waiting_sequence_can_be_removed() -> None:
    """It never gets a slot; the others keep their order."""
    works = [Work(1, 9) for _ in range(4)]
    scheduler = scheduler_of(works, slots=1)
    admit(scheduler)
    scheduler.remove(works[2])
    assert list(scheduler) == [works[0], works[1], works[3]]
    scheduler.remove(works[0])
    assert admit(scheduler) == [works[1]]


def test_additional_slots_are_used_at_once() -> None:
    """Running sequences keep their slots; the new slots have the numbers that follow."""
    works = [Work(1, 9) for _ in range(4)]
    scheduler = scheduler_of(works, slots=1)
    compute(scheduler)
    scheduler.grow(3)
    assert admit(scheduler) == works[1:3]
    assert works[0].slot == 0
    assert {work.slot for work in works[1:3]} == {1, 2}


def test_a_batch_that_was_not_computed_is_repeated() -> None:
    """Nothing is lost when a batch is aborted, and an aborted sequence is not in the next one."""
    aborted, other = Work(2), Work(3)
    scheduler = scheduler_of([aborted, other], slots=2)
    admit(scheduler)
    scheduler.next_batch()
    scheduler.remove(aborted)
    assert sizes(compute(scheduler)) == {other: 3}
    assert other.computed == [0, 1, 2]


def test_short_prompts_that_keep_coming_do_not_starve_a_long_one() -> None:
    """Although they alone would fill every batch."""
    long = Work(10 * BATCH_TOKENS)
    scheduler = scheduler_of([long], slots=2)
    for _ in range(MAX_BATCHES):
        scheduler.add(Work(BATCH_TOKENS))
        compute(scheduler)
    assert long.state is State.FINISHED


def test_sequences_that_share_batches_are_measured_alone_once_in_a_while() -> None:
    """So that it is known what sharing costs: one sequence, no drafts, few batches, and never two
    soon after each other."""
    clock = Clock()
    works = [Work(1, 10**6, (True,)) for _ in range(3)]
    scheduler = scheduler_of(works, slots=len(works))
    scheduler.step_times = StepTimes(clock)
    for _ in range(2):
        batches = [compute(scheduler) for _ in range(2 * ENOUGH * TOGETHER)]
        alone = [number for number, batch in enumerate(batches) if len(batch) == 1]
        assert len(alone) == ENOUGH
        assert all(later - earlier > TOGETHER for earlier, later in pairwise(alone))
        assert not any(chunk.draft for number in alone for chunk in batches[number])
        clock.now += REFRESH_S + 1


def test_batches_smaller_than_the_slots_starve_nobody() -> None:
    """Sequences that generate are in every batch; prompts get a row as soon as one of them ends."""
    works = [Work(1 + number % 3, 20) for number in range(3 * BATCH_TOKENS)]
    scheduler = measured_alone(slots=len(works))
    for work in works:
        scheduler.add(work)
    while not scheduler.is_idle:
        generating = {work for work in scheduler.running if work.is_generating}
        assert generating <= sizes(compute(scheduler)).keys()
    assert all(work.computed == list(range(work.length)) for work in works)


def test_drafts_are_checked_and_the_answer_is_the_same() -> None:
    """Right ones give tokens without a step of their own; what follows a wrong one is dropped."""
    for guesses in ((), (False, True), (True, False, True), (True, True, True)):
        work = Work(1, 100, guesses)
        scheduler = scheduler_of([work], slots=1)
        steps = 0
        while not scheduler.is_idle:
            compute(scheduler)
            steps += 1
        assert work.computed == list(range(work.length))
        assert (steps < 80) == (guesses[:1] == (True,))


def test_the_last_guesses_of_an_answer_are_learned() -> None:
    """They are wrong more often than others: what was copied goes on there."""
    work, speculation = Work(1, 1), Speculation()
    before = speculation.streaks.chance(2)
    scheduler: Scheduler[Work] = Scheduler(1, BATCH_TOKENS, speculation)
    scheduler.add(work)
    admit(scheduler)
    work.guesses = [(2, False)]
    scheduler.remove(work)
    assert speculation.streaks.chance(2) < before


def test_prompts_and_drafts_are_not_in_one_batch() -> None:
    """How long either takes can then be measured."""
    generating, prompt = Work(1, 100, (True,)), Work(4 * BATCH_TOKENS)
    scheduler = scheduler_of([generating], slots=2)
    for _ in range(20):
        compute(scheduler)
    scheduler.add(prompt)
    batches = []
    while prompt.state is not State.FINISHED:
        batches.append(compute(scheduler))
    with_prompt = [batch for batch in batches if len(batch) > 1]
    assert with_prompt
    assert not any(chunk.draft for batch in with_prompt for chunk in batch)
    assert any(chunk.draft for chunk in compute(scheduler))


def test_the_shorter_sequence_is_moved_unless_it_is_too_long() -> None:
    works = [Work(30, 90), Work(1, 40), Work(5, 90)]
    scheduler = scheduler_of(works, slots=3)
    while works[1].state is not State.FINISHED:
        compute(scheduler)
    assert {works[0].slot, works[2].slot} == {0, 2}
    shorter = min(works[0], works[2], key=lambda work: work.position)
    assert scheduler.next_move(most=shorter.position - 1) is None
    assert scheduler.next_move(most=shorter.position) == (shorter, 1)


def test_sequences_with_different_adapters_take_turns() -> None:
    """Those of one adapter share batches; each adapter gets as much time as each other one."""
    works = [Work(1, 10**6, adapter=name) for name in ("", "a", "a", "b", "")]
    scheduler = scheduler_of(works, slots=len(works))
    turns: list[tuple[str, float]] = []
    for _ in range(600):
        batch = compute(scheduler)
        (adapter,) = {chunk.sequence.adapter for chunk in batch}
        if not turns or turns[-1][0] != adapter:
            turns.append((adapter, 0.0))
        turns[-1] = adapter, turns[-1][1] + seconds_of(batch)
    assert [name for name, _ in turns[:6]] == ["", "a", "b", "", "a", "b"]
    assert all(TURN_S <= seconds < TURN_S + 0.05 for _, seconds in turns[:-1])


def test_a_sequence_with_another_adapter_has_its_turn_soon() -> None:
    """Where one has had all of the time, the next comes at once; an adapter that nobody uses has
    no turn."""
    scheduler = scheduler_of([Work(1, 10**6)], slots=2)
    for _ in range(100):
        compute(scheduler)
    other = Work(1, 3, adapter="a")
    scheduler.add(other)
    assert all(sizes(compute(scheduler)) == {other: 1} for _ in range(3))
    assert other.state is State.FINISHED
    assert all(sizes(compute(scheduler)).keys().isdisjoint({other}) for _ in range(100))


class Scheduling(RuleBasedStateMachine):
    """Arrivals, aborts, growth, aborted batches and work in the background in any order, and what
    holds in all of them."""

    @initialize(
        slots=some.integers(1, 6),
        token_s=some.sampled_from((0.0, 0.0002, 0.003, 0.3)),
        is_measured=some.booleans(),
        at_once=some.sampled_from((None, 1, 2, 3, 2 * BATCH_TOKENS)),
    )
    def start(self, slots: int, token_s: float, is_measured: bool, at_once: int | None) -> None:
        self.slots = slots
        self.at_once = at_once
        self.token_s = token_s
        self.scheduler = measured_alone(slots) if is_measured else scheduler_of([], slots)
        self.batches_together = 20 if is_measured else 0
        self.background: Chunk[Work] | None = None
        self.unfinished: list[Work] = []
        """In the order in which they came."""

    @rule(
        prompt_tokens=some.integers(1, 5 * BATCH_TOKENS),
        answer_tokens=some.integers(1, 12),
        count=some.integers(1, 3),
        right_guesses=some.lists(some.booleans(), max_size=2 * MAX_DRAFTS).map(tuple),
        adapter=some.sampled_from(("", "", "a", "b")),
    )
    def arrive(
        self,
        prompt_tokens: int,
        answer_tokens: int,
        count: int,
        right_guesses: tuple[bool, ...] = (),
        adapter: str = "",
    ) -> None:
        for _ in range(count):
            work = Work(prompt_tokens, answer_tokens, right_guesses, adapter)
            self.unfinished.append(work)
            self.scheduler.add(work)

    @rule(count=some.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.compute()

    @rule()
    def abort_a_batch(self) -> None:
        """llama.cpp did not compute it: as if it had not been scheduled."""
        admit(self.scheduler)
        self.scheduler.next_batch(self.at_once)

    @rule()
    def begin_in_background(self) -> None:
        admit(self.scheduler)
        chunk = self.scheduler.next_in_background()
        if chunk is None:
            return
        assert self.background is None, "one at a time"
        self.background = chunk
        assert chunk.sequence.remaining > 1, "of a prompt"
        assert any(work.remaining == 1 for work in self.scheduler.running)
        assert 0 < chunk.size <= BATCH_TOKENS
        assert chunk.has_output is (chunk.size == chunk.sequence.remaining)

    @precondition(lambda self: self.background)
    @rule(is_computed=some.booleans())
    def end_in_background(self, is_computed: bool) -> None:
        assert self.background is not None
        if is_computed:
            complete_in_background(self.scheduler, self.background, self.token_s)
        else:
            self.scheduler.drop_background()
        self.background = None
        self.forget_finished()

    @rule()
    def close_gaps(self) -> None:
        """Each move brings a sequence to the others, until all are side by side."""
        admit(self.scheduler)
        for _ in self.scheduler.running:
            if move := self.scheduler.next_move(10 * MAX_BATCHES):
                self.scheduler.move(*move)
        slots = [work.slot for work in self.scheduler.running]
        assert not slots or max(slots) - min(slots) == len(slots) - 1
        free = {*range(self.slots)} - {*slots}
        assert sorted(self.scheduler.free_slots) == sorted(free)

    @precondition(lambda self: self.unfinished)
    @rule(data=some.data())
    def abort(self, data: some.DataObject) -> None:
        work = data.draw(some.sampled_from(self.unfinished))
        if self.background and self.background.sequence is work:
            self.end_in_background(is_computed=False)
        self.unfinished.remove(work)
        self.scheduler.remove(work)

    @rule(more=some.integers(1, 3))
    def grow(self, more: int) -> None:
        self.slots += more
        self.scheduler.grow(self.slots)

    def compute(self) -> list[Chunk[Work]]:
        admit(self.scheduler)
        # The last token of a prompt takes as long as one of an answer.
        generating = {work for work in self.scheduler.running if work.remaining == 1}
        batch = compute(self.scheduler, token_s=self.token_s, at_once=self.at_once)
        works = sizes(batch)
        assert len(works) == len(batch), "a sequence is in a batch once"
        adapters = {work.adapter for work in works}
        assert len(adapters) <= 1, "one adapter"
        generating = {work for work in generating if work.adapter in adapters}
        rows = 0
        for chunk in batch:
            assert chunk.has_output or not chunk.draft
            rows += chunk.size + len(chunk.draft)
        assert rows <= BATCH_TOKENS
        drafts = sum(len(chunk.draft) for chunk in batch)
        assert drafts <= MAX_DRAFTS
        assert not drafts or {*works.values()} == {1}, "no prompts beside drafts"
        assert all(size > 0 for size in works.values())
        if self.background is not None:
            assert not drafts
            assert works.keys() <= generating, "no prompts"
        else:
            assert bool(works) == bool(self.unfinished)
        together = min(len(generating), self.at_once or BATCH_TOKENS, BATCH_TOKENS)
        if len(generating & works.keys()) == together:
            self.batches_together += 1
        else:
            assert len(works) == 1, "one that is measured alone"
            assert generating >= works.keys()
            assert self.batches_together >= TOGETHER
            self.batches_together = 0
        self.forget_finished()
        return batch

    def forget_finished(self) -> None:
        for work in [w for w in self.unfinished if w.state is State.FINISHED]:
            assert work.computed == list(range(work.length)), "each token once and in order"
            self.unfinished.remove(work)

    @invariant()
    def none_is_lost(self) -> None:
        """Each is in the scheduler once: first those with a slot, then those that wait, in the
        order in which they came."""
        known = list(self.scheduler)
        assert sorted(map(id, known)) == sorted(map(id, self.unfinished))
        waiting = [work for work in self.unfinished if work.state is State.WAITING]
        running = [work for work in self.unfinished if work.state is State.RUNNING]
        assert known[len(running) :] == waiting
        assert {*self.scheduler.running} == {*running}
        slots = [work.slot for work in running]
        assert len({*slots}) == len(slots)
        assert {*slots} <= {*range(self.slots)}

    def teardown(self) -> None:
        """None is starved: what is there now ends, however much else keeps coming."""
        present = list(self.unfinished)
        for _ in range(MAX_BATCHES):
            if all(work.state is State.FINISHED for work in present):
                break
            self.arrive(prompt_tokens=BATCH_TOKENS, answer_tokens=1, count=1)
            self.compute()
            if self.background:
                self.end_in_background(is_computed=True)
            self.begin_in_background()
        assert all(work.state is State.FINISHED for work in present)


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
