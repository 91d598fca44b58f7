"""Guessed tokens on the real llama.cpp: the same answers as without, on four kinds of memory."""

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import pytest
from numpy.typing import NDArray

from services.inferer.engine import lookup as lookup_module
from services.inferer.engine.constraint import constraint
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.lookup import Lookup
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.speculation import MAX_DRAFTS, Speculation
from services.inferer.settings import Batching
from shared.wire.requests import JsonObject, ModelRequest
from tests.support.architectures import write_hybrid, write_mamba, write_windowed
from tests.support.drafts import is_from_answers
from tests.support.processes import eventually
from tests.support.tiny_model import write_tiny_model

MIB = 1024**2
PATIENCE_S = 60.0
ROUNDING = 0.1
"""Logits: more than batches are rounded differently, far less than lies between two texts."""

KINDS: dict[str, Callable[[Path], Path]] = {
    "dense": write_tiny_model,
    "window": write_windowed,
    "hybrid": write_hybrid,
    "recurrent": write_mamba,
}
CAN_SPECULATE = ("dense", "window")


class Eager(Speculation):
    """Checks drafts whatever they cost, a random number of them."""

    def __init__(self) -> None:
        super().__init__()
        self._choose = random.Random(7)
        self.learned: list[tuple[int, bool]] = []
        self.from_answers: list[tuple[Sequence, list[int], list[int]]] = []
        """Drafts from earlier answers: the sequence, its tokens so far, and the draft."""
        self.checked = self.right = 0
        """Drafts, not counting the last ones of each sequence."""
        self._before: dict[Sequence, tuple[int, int]] = {}
        """The tokens and the drafts of a sequence when they were scheduled."""

    def counts(self, sequences: Collection[Sequence], room: int) -> list[int]:
        left = min(room, MAX_DRAFTS)
        counts = []
        for sequence in sequences:
            tokens, drafts = self._before.get(sequence, (0, 0))
            if drafts and len(sequence.tokens) > tokens:
                self.checked += drafts
                self.right += len(sequence.tokens) - tokens - 1
            if is_from_answers(sequence):
                self.from_answers.append((sequence, [*sequence.tokens], sequence.draft))
            count = min(left, len(sequence.draft), self._choose.randint(0, MAX_DRAFTS))
            self._before[sequence] = (len(sequence.tokens), count)
            counts.append(count)
            left -= count
        return counts

    def learn(self, sequence: Sequence) -> None:
        self.learned += sequence.guesses

    def observe(self, sequences: int, drafts: int, seconds: float) -> None:
        pass


class Noting(Sampler):
    """Keeps what it has chosen, and from which logits. Random weights copy nothing: with a share of
    ``copies`` it chooses what followed the last tokens before, instead of what the model says."""

    def __init__(
        self, model: Model, options: ModelRequest, prompt: list[int], copies: float
    ) -> None:
        super().__init__(model, options, 1, prompt, constraint(model, options))
        self._size = model.vocabulary.size
        self._copies = copies
        self._choose = random.Random(7)
        self._lookup = Lookup(prompt)
        self.chosen: list[int] = []
        self.logits: list[NDArray[numpy.float32]] = []

    def sample(self, context: object, row: int) -> int:
        native = llama_cpp.llama_get_logits_ith(context, row)
        self.logits.append(numpy.ctypeslib.as_array(native, shape=(self._size,)).copy())
        token = super().sample(context, row)
        if self._choose.random() < self._copies:
            token = next(iter(self._lookup.continuation(1)), token)
        self._lookup.add(token)
        self.chosen.append(token)
        return token


class Run:
    """A sequence in the engine. A cold one is computed without drafts."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        *,
        owner: str = "",
        is_cold: bool = False,
        is_repeatable: bool = False,
        copies: float = 0.8,
        **options: Any,
    ) -> None:
        self.prompt = prompt
        self.options = {"copies": copies, **options}
        sampling = ModelRequest(prompt="x", **{"temperature": 0, **options})
        self.sampler = Noting(engine.model, sampling, prompt, copies)
        self.texts: list[str] = []
        self._ended: Future[Generation | Exception] = Future()
        self.sequence = GenerationSequence(
            lambda: (prompt, [self.sampler]),
            sampling.max_tokens or engine.n_ctx,
            sampling.stop_strings,
            self.texts.append,
            self._ended.set_result,
        )
        self.sequence.owner = owner
        self.sequence.is_cold = is_cold
        self.sequence.is_repeatable = is_repeatable
        engine.submit(self.sequence)

    def has_begun(self) -> bool:
        """Whether it has a token; or has ended, if the first one ended it."""
        return bool(self.sampler.chosen) or self._ended.done()

    def outcome(self) -> Generation | Exception:
        return self._ended.result(PATIENCE_S)

    def generation(self) -> Generation:
        outcome = self.outcome()
        assert isinstance(outcome, Generation), outcome
        return outcome


@contextmanager
def running(
    model: Model,
    speculation: Speculation,
    slots: int = 1,
    n_ctx: int = 2048,
    n_batch: int = 64,
    batching: Batching = "on",
    cache_bytes: int = 4 * MIB,
) -> Iterator[Engine]:
    engine = Engine(
        model,
        slots=slots,
        n_ctx=n_ctx,
        n_batch=n_batch,
        threads=1,
        batching=batching,
        cache_bytes=cache_bytes,
        speculation=speculation,
    )
    try:
        yield engine
    finally:
        assert engine.close()


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tiny(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(KINDS[kind](tmp_path_factory.mktemp(kind) / "tiny.gguf"), 0, chat=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write_tiny_model(tmp_path_factory.mktemp("dense") / "tiny.gguf"), 0, chat=False)
    yield model
    model.close()


def compare(engine: Engine, run: Run) -> bool:
    """Whether ``run`` has the same tokens as without drafts. Checks that it has, unless two tokens
    are so nearly equally likely that rounding decides; until there, the model's outputs are the
    same but for rounding."""
    generation = run.generation()
    plain = Run(engine, run.prompt, is_cold=True, **run.options)
    expected = plain.generation()
    mine, theirs = run.sampler, plain.sampler
    for row, other_row, token, other in zip(
        mine.logits, theirs.logits, mine.chosen, theirs.chosen, strict=False
    ):
        assert float(numpy.abs(row - other_row).max()) < ROUNDING
        if token != other:
            assert run.options.get("temperature") or abs(row[token] - row[other]) < ROUNDING
            return False
    assert mine.chosen == theirs.chosen
    assert "".join(run.texts) == "".join(plain.texts)
    assert generation.finish_reason == expected.finish_reason
    assert generation.completion_tokens == expected.completion_tokens
    return True


def random_options(choose: random.Random, words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": choose.randint(1, 90)}
    options |= choose.choice(
        [
            {},
            {"copies": 0.0},
            {"copies": 0.0, "temperature": 0.8},
            {"temperature": 0.8, "repeat_penalty": 1.1},
            {"temperature": 0.8, "top_k": 5, "copies": 0.9},
            {"response_format": JsonObject(), "copies": 0.0},
            {"stop": choose.sample(words, 2)},
        ]
    )
    return options


def check_owners(eager: Eager, runs: list[Run]) -> None:
    """What is guessed from earlier answers is in answers of the same owner, its own not counted
    but for what it has so far."""
    written: dict[tuple[str, tuple[int, ...]], set[Sequence]] = defaultdict(set)
    """By owner and tokens: the sequences that have these together."""
    for run in runs:
        for tokens in fives([*run.prompt, *run.sampler.chosen]):
            written[run.sequence.owner, tokens].add(run.sequence)
    for sequence, text, draft in eager.from_answers:
        own = {*fives(text)}
        for tokens in fives([*text[-4:], *draft]):
            assert tokens in own or written[sequence.owner, tokens] - {sequence}


def fives(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[end - 5 : end]) for end in range(5, len(tokens) + 1)]


@pytest.mark.parametrize("batching", ["on", "off"])
def test_random_prompts_give_the_same_tokens_with_drafts(
    tiny: Model, kind: str, batching: Batching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repetitions, further turns, the same jobs again, sampling, grammars, stop strings and
    aborts, of two owners; two at a time. Some of the earlier answers are forgotten again."""
    monkeypatch.setattr(lookup_module, "CAPACITY", 500)
    choose = random.Random(7)
    words = ["order", "paid", "by", "card", "4711", "lantern", "Bergen", ",", ".", "\n"]
    eager = Eager()
    with running(tiny, eager, slots=2, batching=batching) as engine:
        runs: list[Run] = []
        all_runs: list[Run] = []
        for _ in range(60):
            if runs and choose.random() < 0.3:
                earlier = choose.choice(runs[-4:])
                earlier.outcome()
                prompt = [*earlier.prompt, *earlier.sampler.chosen]
            else:
                prompt = tiny.tokenize(" ".join(choose.choices(words, k=choose.randint(1, 80))))
            prompt, options = prompt[-500:], random_options(choose, words)
            if runs and choose.random() < 0.6:
                again = choose.choice(runs[-4:])
                prompt, options = again.prompt, again.options
            run = Run(engine, prompt, owner=choose.choice(["ann", "bob"]), **options)
            all_runs.append(run)
            if choose.random() < 0.1:
                if choose.random() < 0.5:
                    eventually(run.has_begun, "its first token")
                engine.abort(run.sequence)
                run.outcome()
            else:
                runs.append(run)
        for run in runs:
            run.generation()
        checked, right = eager.checked, eager.right
        if kind in CAN_SPECULATE:
            assert right > 100
            assert checked - right > 20
            assert len(eager.from_answers) > 20
            check_owners(eager, all_runs)
        else:
            assert checked == 0
        same = sum(compare(engine, run) for run in runs)
        assert eager.checked == checked, "a cold job has no drafts"
    # Rounding decides more often where tokens are sampled: each one is near others there.
    assert same > len(runs) / 2


@pytest.mark.parametrize(("copies", "stop"), [((0.8, 0.8), []), ((1.0, 0.5), ["three"])])
def test_each_guess_is_learned(dense: Model, copies: tuple[float, float], stop: list[str]) -> None:
    """Once, with the streak before it, whether it was checked or not; each answer begins without
    one. The first token of all and the last one that ``max_tokens`` allows are not guessed."""
    eager, max_tokens = Eager(), 60
    ended: Future[Generation | Exception] = Future()
    prompt = dense.tokenize("one two three" * 9)
    options = ModelRequest(prompt="x", temperature=0)
    samplers = [Noting(dense, options, prompt, share) for share in copies]
    with running(dense, eager) as engine:
        engine.submit(
            GenerationSequence(
                lambda: (prompt, [*samplers]), max_tokens, stop, lambda _: None, ended.set_result
            )
        )
        assert isinstance(ended.result(PATIENCE_S), Generation)
    lookup, expected = Lookup(prompt), []
    for choice, sampler in enumerate(samplers):
        streak = 0
        for number, token in enumerate(sampler.chosen, 1):
            guess = lookup.continuation(1)
            is_guessed = bool(guess) and number < max_tokens and (choice, number) != (0, 1)
            if is_guessed:
                expected.append((streak, guess == [token]))
            streak = streak + 1 if is_guessed and guess == [token] else 0
            if number < len(sampler.chosen):
                lookup.add(token)
        lookup.begin_next_answer()
    assert eager.learned == expected
    assert {is_right for _, is_right in expected} == {True, False}
    if stop:  # it ends the first answer in the middle of what it copies
        assert expected[1:3] == [(1, True), (0, True)]


PROMPT = "one two three " * 5
TEXT: dict[str, Any] = {"copies": 0.0, "temperature": 0.8, "max_tokens": 80}
"""The same text each time, which hardly repeats itself."""


@pytest.mark.parametrize("change", ["none", "owner", "cold", "repeatable", "no cache"])
def test_an_answer_is_guessed_from_an_earlier_one_of_the_same_owner(
    dense: Model, change: str
) -> None:
    """If both may be reused, and whatever the two prompts begin with."""
    eager = Eager()
    with running(dense, eager, cache_bytes=0 if change == "no cache" else MIB) as engine:
        is_not = {"is_cold": change == "cold", "is_repeatable": change == "repeatable"}
        first = Run(engine, dense.tokenize(PROMPT), owner="ann", **is_not, **TEXT)
        first.generation()
        assert not eager.from_answers
        owner = "bob" if change == "owner" else "ann"
        second = Run(engine, first.prompt, owner=owner, **TEXT)
        second.generation()
        assert second.sampler.chosen == first.sampler.chosen
        if change == "none":
            assert len(eager.from_answers) > 5
            assert eager.right > 20
            other = Run(engine, dense.tokenize(f"other {PROMPT}"), owner="ann", **TEXT)
            compare(engine, other)
        else:
            assert not eager.from_answers
        before = len(eager.from_answers)
        for what in ("is_cold", "is_repeatable"):
            Run(engine, first.prompt, owner="ann", **{what: True}, **TEXT).generation()
            assert len(eager.from_answers) == before, what


def test_what_was_generated_before_an_abort_is_guessed_from(dense: Model) -> None:
    eager = Eager()
    with running(dense, eager) as engine:
        options = {**TEXT, "max_tokens": 1500, "ignore_eos": True}
        first = Run(engine, dense.tokenize(PROMPT), **options)
        eventually(lambda: len(first.sampler.chosen) > 60, "sixty tokens")
        engine.abort(first.sequence)
        first.outcome()
        second = Run(engine, first.prompt, **{**options, "max_tokens": 60})
        compare(engine, second)
        assert len(eager.from_answers) > 5


def test_what_is_generated_at_the_same_time_is_guessed_from(dense: Model) -> None:
    eager = Eager()
    with running(dense, eager, slots=2) as engine:
        first = Run(engine, dense.tokenize(PROMPT), **{**TEXT, "max_tokens": 1500})
        eventually(lambda: len(first.sampler.chosen) > 60, "sixty tokens")
        second = Run(engine, first.prompt, **TEXT)
        compare(engine, second)
        assert not first._ended.done()
        assert len(eager.from_answers) > 5
        engine.abort(first.sequence)


def test_what_a_slot_holds_after_drafts_is_reused(dense: Model) -> None:
    """Neither more nor less than the tokens of the answer."""
    eager = Eager()
    with running(dense, eager) as engine:
        prompt = dense.tokenize("one two three " * 30)
        for _ in range(10):
            run = Run(engine, prompt, max_tokens=17)
            run.generation()
            prompt = [*prompt, *run.sampler.chosen]
            turn = Run(engine, [*prompt, 7], max_tokens=1)
            assert turn.generation().cached_tokens == len(prompt) - 1
            compare(engine, turn)
    assert eager.checked


def test_an_answer_ends_where_the_context_ends(dense: Model) -> None:
    eager = Eager()
    with running(dense, eager, slots=2, n_ctx=256) as engine:
        prompt = dense.tokenize("one two three " * 30)
        runs = [Run(engine, prompt), Run(engine, prompt)]
        for run in runs:
            generation = run.generation()
            assert generation.finish_reason == "length"
            assert generation.completion_tokens == 256 - len(prompt)
            compare(engine, run)
    assert eager.checked


def test_batches_smaller_than_the_drafts(dense: Model) -> None:
    """They take part of them, or none."""
    eager = Eager()
    with running(dense, eager, slots=3, n_batch=4) as engine:
        prompt = dense.tokenize("one two three " * 30)
        runs = [Run(engine, prompt, max_tokens=60, copies=copies) for copies in (0.0, 0.8, 0.9)]
        for run in runs:
            compare(engine, run)
    assert eager.checked


def test_a_growth_beside_drafts(dense: Model) -> None:
    eager = Eager()
    with running(dense, eager) as engine:
        run = Run(engine, dense.tokenize("one two three " * 30), max_tokens=300)
        eventually(lambda: len(run.sampler.chosen) > 10, "ten tokens")
        engine.grow(2).result(PATIENCE_S)
        other = Run(engine, dense.tokenize("one two"), max_tokens=100)
        compare(engine, other)
        compare(engine, run)
    assert eager.checked


def test_what_pays_is_measured(dense: Model) -> None:
    """With the real policy: the same tokens, whatever it decides."""
    with running(dense, Speculation()) as engine:
        for number in range(5):
            run = Run(engine, dense.tokenize(f"{number} one two three " * 9), max_tokens=60)
            compare(engine, run)
