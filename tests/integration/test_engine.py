"""The engine on the real llama.cpp: a tiny random model, and the bundled one where it must end."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import jsonschema_rs
import llama_cpp
import numpy
import pytest

from services.inferer.engine import native_log
from services.inferer.engine.constraint import constraint
from services.inferer.engine.context import NOT_SET
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted, State
from services.inferer.engine.thread_pool import ThreadPool
from services.inferer.settings import Batching
from shared.errors import InvalidRequest, ModelError, OutOfMemory
from shared.wire.requests import ChatMessage, JsonObject, ModelRequest, Sampling
from tests.support.processes import ROOT
from tests.support.schemas import schema_format

N_CTX = 4096
PATIENCE_S = 60.0
ROUNDING = 0.1
"""Logits: more than batches are rounded differently, far less than lies between two prompts."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ready": {"type": "boolean"},
        "size": {"enum": [1, 2, 3]},
    },
    "required": ["name", "ready", "size"],
    "additionalProperties": False,
}


both_ways = pytest.mark.parametrize(("batching", "threads"), [("on", 1), ("off", 1), ("off", 2)])
"""One context for all sequences, or one for each: computed in turn, or side by side."""


@contextmanager
def running(
    model: Model,
    *,
    slots: int = 1,
    n_ctx: int = N_CTX,
    n_batch: int = 512,
    threads: int = 1,
    batching: Batching = "on",
) -> Iterator[Engine]:
    engine = Engine(
        model, slots=slots, n_ctx=n_ctx, n_batch=n_batch, threads=threads, batching=batching
    )
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    with running(model) as one_slot:
        yield one_slot


class Noting(Sampler):
    """A sampler that keeps what it has chosen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.chosen: list[int] = []

    def sample(self, context: object, row: int) -> int:
        self.chosen.append(super().sample(context, row))
        return self.chosen[-1]


class Retracing(Sampler):
    """Chooses what another has chosen, and notes by how much it was not the best."""

    def __init__(self, model: Model, prompt: list[int], chosen: list[int]) -> None:
        super().__init__(model, Sampling(), 0, prompt)
        self._size = model.vocabulary.size
        self._chosen = iter(chosen)
        self.behind: list[float] = []
        """Logits between the best token and the one chosen."""

    def sample(self, context: object, row: int) -> int:
        token = next(self._chosen)
        native = llama_cpp.llama_get_logits_ith(context, row)
        logits = numpy.ctypeslib.as_array(native, shape=(self._size,))
        self.behind.append(float(logits.max() - logits[token]))
        return token


class Run:
    """A sequence on its way: the text of each token, and how it ends."""

    def __init__(self, engine: Engine, prompt: str | list[int], options: dict[str, Any]) -> None:
        sampling = ModelRequest(prompt="x", **{"max_tokens": 20, "seed": 1, **options})
        tokens = engine.model.tokenize(prompt) if isinstance(prompt, str) else prompt
        self.texts: list[str] = []
        self._ended: Future[Generation | Exception] = Future()
        self.prompt = tokens
        grammar = constraint(engine.model, sampling)
        self.sampler = sampler = Noting(engine.model, sampling, sampling.seed or 0, tokens, grammar)
        self.sequence = GenerationSequence(
            prepare=lambda: (tokens, [sampler]),
            max_tokens=sampling.max_tokens or 0,
            stop=sampling.stop_strings,
            on_text=self.texts.append,
            on_end=self._ended.set_result,
            stop_tokens=sampling.stop_token_ids or (),
        )
        engine.submit(self.sequence)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def done(self) -> bool:
        return self._ended.done()

    def has_started(self) -> bool:
        return self.sequence.started > 0

    def outcome(self) -> Generation | Exception:
        return self._ended.result(PATIENCE_S)

    def generation(self) -> Generation:
        outcome = self.outcome()
        assert isinstance(outcome, Generation), outcome
        return outcome


def start(engine: Engine, prompt: str | list[int] = "Once upon a time", **options: Any) -> Run:
    return Run(engine, prompt, options)


def answer(engine: Engine, prompt: str | list[int] = "Once upon a time", **options: Any) -> str:
    run = start(engine, prompt, **options)
    run.generation()
    return run.text


def behind(engine: Engine, run: Run) -> float:
    """How far, in logits, the worst token of a greedy ``run`` is from the best one, when its
    sequence is computed alone. In a batch with others llama.cpp adds in another order, and two
    tokens that are nearly as likely may change places; numbers of another sequence would put it
    far behind."""
    chosen = run.sampler.chosen
    sampler = Retracing(engine.model, run.prompt, chosen)
    ended: Future[Generation | Exception] = Future()
    samplers: list[Sampler] = [sampler]
    prepare = lambda: (run.prompt, samplers)  # noqa: E731
    engine.submit(GenerationSequence(prepare, len(chosen), [], lambda text: None, ended.set_result))
    assert isinstance(ended.result(PATIENCE_S), Generation)
    assert len(sampler.behind) == len(chosen)
    return max(sampler.behind)


def wait_until(condition: Callable[[], Any], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"not in time: {what}"
        time.sleep(0.001)


def test_max_tokens_end_an_answer(engine: Engine) -> None:
    """Exactly so many tokens, `length`, counted and timed."""
    run = start(engine, max_tokens=7)
    generation = run.generation()
    assert (generation.finish_reason, generation.completion_tokens) == ("length", 7)
    assert generation.prompt_tokens == len(engine.model.tokenize("Once upon a time"))
    assert generation.prompt_ms > 0
    assert generation.generation_ms > 0
    assert len(run.texts) == 7


def test_a_seed_decides_the_text(engine: Engine) -> None:
    """The same gives the same, another another; also what llama.cpp takes for "a random one"."""
    assert answer(engine, seed=1) != answer(engine, seed=2)
    for seed in (1, -1, 2**32 - 1, -(2**63), 2**63 - 1):
        assert answer(engine, seed=seed) == answer(engine, seed=seed)


def test_temperature_0_and_its_equals(engine: Engine) -> None:
    """The likeliest token whatever the seed; each other way to allow only one does the same."""
    greedy = answer(engine, temperature=0)
    assert answer(engine, temperature=0, seed=2) == greedy
    assert answer(engine, top_k=1) == greedy
    assert answer(engine, top_k=0, top_p=0) == greedy
    assert answer(engine, top_k=0, min_p=1) == greedy
    assert answer(engine, top_k=0, top_p=1, min_p=0, temperature=2) != greedy


@pytest.mark.parametrize(
    "penalty", [{"repeat_penalty": 3.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
)
def test_penalties_take_effect(engine: Engine, penalty: dict[str, float]) -> None:
    """Where the likeliest token is one that the prompt has, it becomes another one."""
    prompt = engine.model.tokenize("Once upon a time")
    while True:
        piece = answer(engine, prompt, temperature=0, max_tokens=1)
        (token,) = engine.model.tokenize(piece, add_special=False)
        if token in prompt:
            break
        prompt.append(token)
    assert answer(engine, prompt, temperature=0, max_tokens=1, **penalty) != piece


def test_a_stop_string_ends_an_answer(engine: Engine) -> None:
    """The text ends before it, with `stop`; what only begins like one is part of the text."""
    whole = answer(engine, max_tokens=40)
    stop = whole[len(whole) // 2 :][:6]
    run = start(engine, max_tokens=40, stop=["never there", stop])
    assert run.generation().finish_reason == "stop"
    assert run.text == whole.partition(stop)[0]
    run = start(engine, max_tokens=40, stop=[whole[-3:] + " never there"])
    assert run.generation().finish_reason == "length"
    assert run.text == whole


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_bias_bans_tokens_or_forces_them(engine: Engine, temperature: float) -> None:
    """What has -100 does not come, and what has 100 nearly always does; anything in between moves
    the choice."""
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": 60}
    run = start(engine, **options)
    run.generation()
    likely = set(run.sampler.chosen)
    banned = start(engine, logit_bias=dict.fromkeys(likely, -100.0), **options)
    banned.generation()
    assert not likely & set(banned.sampler.chosen)
    (token,) = engine.model.tokenize("x", add_special=False)
    forced = start(engine, logit_bias={token: 100.0}, **options)
    forced.generation()
    assert set(forced.sampler.chosen) == {token}
    without = start(engine, logit_bias={token: 0.0}, **options)
    without.generation()
    assert without.sampler.chosen == run.sampler.chosen


def test_a_schema_wins_over_a_bias(engine: Engine) -> None:
    """Even one that bans every token the schema allows."""
    vocabulary = range(engine.model.vocabulary.size)[:1024]
    form = schema_format({"type": "string", "enum": ["yes", "no"]})
    for temperature in (0, 1.0):
        text = answer(
            engine,
            response_format=form,
            logit_bias=dict.fromkeys(vocabulary, -100.0),
            temperature=temperature,
        )
        assert json.loads(text) in ("yes", "no")


def test_an_answer_goes_on_for_so_many_tokens(engine: Engine) -> None:
    """With `min_tokens` it may end after them, with `ignore_eos` it does not end by itself."""
    ends = engine.model.vocabulary.ends
    wanted = dict.fromkeys(ends, 100.0)
    run = start(engine, logit_bias=wanted, max_tokens=30)
    assert (run.generation().completion_tokens, run.outcome().finish_reason) == (0, "stop")  # type: ignore[union-attr]
    run = start(engine, logit_bias=wanted, min_tokens=7, max_tokens=30)
    assert (run.generation().completion_tokens, run.generation().finish_reason) == (7, "stop")
    run = start(engine, logit_bias=wanted, ignore_eos=True, max_tokens=30)
    assert (run.generation().completion_tokens, run.generation().finish_reason) == (30, "length")


def test_a_stop_token_ends_an_answer(engine: Engine) -> None:
    """It adds no text; with `min_tokens` it cannot come before."""
    run = start(engine, temperature=0, max_tokens=30)
    run.generation()
    stop = next(token for token in run.sampler.chosen[5:] if token not in run.sampler.chosen[:5])
    at = run.sampler.chosen.index(stop)
    stopped = start(engine, temperature=0, max_tokens=30, stop_token_ids=[stop])
    assert stopped.generation().finish_reason == "stop"
    assert stopped.sampler.chosen == run.sampler.chosen[: at + 1]
    assert stopped.text == "".join(run.texts[:at])
    later = start(engine, temperature=0, max_tokens=30, stop_token_ids=[stop], min_tokens=at + 5)
    later.generation()
    assert stop not in later.sampler.chosen[: at + 5]


def test_tokens_that_the_model_does_not_have_are_refused(engine: Engine) -> None:
    size = engine.model.vocabulary.size
    cases: list[tuple[str, Any]] = [("logit_bias", {size: 1.0}), ("stop_token_ids", [5, size])]
    for param, value in cases:
        with pytest.raises(
            InvalidRequest, match=f"{param}: {size} is not a token of this model"
        ) as raised:
            start(engine, **{param: value})
        assert raised.value.param == param


def test_an_answer_under_a_schema_is_valid(engine: Engine) -> None:
    """Even random weights give JSON that is valid under it, and end; without one, an object."""
    form = schema_format(SCHEMA)
    for seed in range(3):
        run = start(engine, seed=seed, max_tokens=N_CTX, response_format=form)
        assert run.generation().finish_reason == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(run.text))
    assert answer(engine, response_format=JsonObject()).lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"pattern": "[", "type": "string"}, 5]
)
def test_a_schema_that_makes_no_grammar_is_refused(engine: Engine, schema: Any) -> None:
    """The request is refused before it runs, and the engine works on."""
    with pytest.raises(InvalidRequest) as raised:
        start(engine, response_format=schema_format(schema))
    assert raised.value.param == "response_format"
    assert answer(engine)


def test_a_grammar_that_allows_nothing_does_not_end_the_process(tiny_model: Path) -> None:
    """llama.cpp throws in C++, which ends a process: so a child shows that ours lives on."""
    code = f"""
from tests.integration.test_engine import *
with running(Model(Path({str(tiny_model)!r}), 0)) as engine:
    try:
        form = schema_format({{"type": "string", "pattern": "^[z-a]$"}})
        outcome = start(engine, response_format=form).outcome()
    except InvalidRequest as error:
        outcome = error
    assert isinstance(outcome, (InvalidRequest, ModelError)), outcome
    assert answer(engine)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]


def test_a_request_that_cannot_be_prepared_fails_alone(model: Model) -> None:
    """Whatever it stumbles over, say in a chat template: its neighbour in the batch goes on."""

    def fails() -> NoReturn:
        raise KeyError("x")

    failed: Future[Generation | Exception] = Future()
    with running(model, slots=2) as engine:
        neighbour = start(engine, max_tokens=100)
        wait_until(lambda: neighbour.texts, "the neighbour runs")
        engine.submit(GenerationSequence(fails, 5, [], lambda text: None, failed.set_result))
        assert isinstance(failed.result(PATIENCE_S), ModelError)
        assert neighbour.generation().completion_tokens == 100


def test_an_abort_in_the_middle_of_a_prompt_leaves_the_context_clean(model: Model) -> None:
    """One call of llama.cpp is broken off; the context then works as if nothing had been."""
    with running(model, n_ctx=8192, n_batch=8192) as engine:
        before = answer(engine)
        run = start(engine, model.tokenize("word " * 8000)[:8000])
        wait_until(run.has_started, "the prompt is under way")
        engine.abort(run.sequence)
        assert isinstance(run.outcome(), Aborted)
        assert (run.texts, run.sequence.position) == ([], 0)
        assert answer(engine) == before


def test_an_abort_in_the_middle_of_an_answer_leaves_the_context_clean(engine: Engine) -> None:
    """It ends at once with what it had, and the next answer is what it would have been."""
    before = answer(engine)
    run = start(engine, max_tokens=N_CTX)
    wait_until(lambda: len(run.texts) > 5, "some tokens")
    engine.abort(run.sequence)
    assert isinstance(run.outcome(), Aborted)
    assert len(run.texts) < N_CTX - 100
    assert answer(engine) == before


def test_what_is_left_of_a_prompt_is_known_while_it_is_computed(model: Model) -> None:
    with running(model, n_ctx=8192, n_batch=64) as engine:
        run = start(engine, model.tokenize("word " * 8000)[:8000], max_tokens=2)
        seen: list[int | None] = [None]
        give_up_at = time.monotonic() + PATIENCE_S
        while not run.done and time.monotonic() < give_up_at:
            if (left := run.sequence.prompt_tokens_left) != seen[-1]:
                seen.append(left)
            time.sleep(0.001)
        run.generation()
        counts = [left for left in seen if left is not None]
        assert seen == [None, *counts]
        assert counts == sorted(counts, reverse=True)
        assert any(0 < left < 8000 for left in counts)
        assert run.sequence.prompt_tokens_left == 0


def test_aborts_that_keep_coming_do_not_stop_a_long_prompt(model: Model) -> None:
    """Each may break off the batch that its sequence is in, but not one batch after another."""
    with running(model, slots=2, n_ctx=8192, n_batch=8192) as engine:
        long = start(engine, model.tokenize("word " * 8000)[:8000], max_tokens=1)
        give_up_at = time.monotonic() + PATIENCE_S
        while not long.done:
            assert time.monotonic() < give_up_at, "the long prompt is not computed"
            victim = start(engine, model.tokenize("other " * 2000)[:2000])
            time.sleep(0.01)
            engine.abort(victim.sequence)
            assert isinstance(victim.outcome(), (Aborted, Generation))
        long.generation()


def test_an_abort_of_a_sequence_that_waits_interrupts_nothing(model: Model) -> None:
    with running(model) as engine:
        run = start(engine, max_tokens=N_CTX)
        wait_until(lambda: run.texts, "it runs")
        waiting = start(engine)
        wait_until(lambda: waiting.sequence.state is State.WAITING, "it waits")
        engine.abort(waiting.sequence)
        assert engine._abort_flag.raw[:1] == NOT_SET
        assert isinstance(waiting.outcome(), Aborted)
        assert not run.done
        engine.abort(run.sequence)
        run.outcome()


def test_threads_stay_from_one_batch_to_the_next(model: Model) -> None:
    """Those that compute; in a larger context, too."""
    engine = Engine(model, slots=1, n_ctx=N_CTX, n_batch=512, threads=2)
    before = threads()
    run = start(engine, max_tokens=1000)
    seen: set[str] = set()
    for _ in range(2):
        tokens = len(run.texts)
        while len(run.texts) < tokens + 20:
            seen |= threads()
        engine.grow(engine.slots + 1).result(PATIENCE_S)
    engine.abort(run.sequence)
    run.outcome()
    assert engine.close()
    # Not one for each of 40 batches; each growth has a thread that prepares requests.
    assert len(seen - before) < 10


def test_threads_sleep_while_there_is_nothing_to_compute(model: Model) -> None:
    """At once: otherwise each of them would take a core for 20 ms after every job."""
    engine = Engine(model, slots=1, n_ctx=N_CTX, n_batch=512, threads=2)
    pause_s, idle_s = 0.02, []
    try:
        for _ in range(30):
            answer(engine, max_tokens=2)
            before = time.process_time()
            time.sleep(pause_s)
            idle_s.append(time.process_time() - before)
    finally:
        engine.close()
    assert median(idle_s) < pause_s / 4


@pytest.mark.parametrize(("max_tokens", "rests"), [(20, 1), (1, 0)])
def test_threads_rest_after_the_first_token(
    model: Model, monkeypatch: pytest.MonkeyPatch, max_tokens: int, rests: int
) -> None:
    """Once, and not where it is the last one, too: then there is nothing to compute anyway."""
    rested = []
    with running(model) as engine:
        rest = engine._rest

        def noted() -> None:
            rested.append(engine.steps)
            rest()

        monkeypatch.setattr(engine, "_rest", noted)
        generation = start(engine, max_tokens=max_tokens).generation()
        assert generation.completion_tokens == max_tokens
    assert len(rested) == rests


def test_a_pool_of_threads_ends_when_it_is_closed() -> None:
    before = threads()
    pool = ThreadPool(4)
    assert len(threads() - before) == 3  # the fourth is the one that calls
    pool.close()
    assert threads() <= before


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def test_a_closed_engine_answers(model: Model) -> None:
    """Whatever is asked of it then ends at once."""
    with running(model) as engine:
        pass
    assert isinstance(start(engine).outcome(), Aborted)
    assert engine.grow(2).cancelled()


def test_a_failure_quotes_nothing_that_was_logged_before(model: Model) -> None:
    with running(model, n_ctx=256) as engine:
        native_log._problems.append("an error of another job")
        engine.n_ctx = 8192
        outcome = start(engine, model.tokenize("word " * 400), max_tokens=1).outcome()
        assert isinstance(outcome, OutOfMemory)
        assert "another job" not in outcome.message


@both_ways
def test_an_abort_leaves_the_other_sequences_alone(
    model: Model, batching: Batching, threads: int
) -> None:
    """The batch that is broken off has both: the other sequence repeats it, with its own numbers
    and none of the victim's."""
    with running(model, slots=2, threads=threads, batching=batching) as engine:
        run = start(engine, "another prompt", max_tokens=150, temperature=0)
        for _ in range(10):
            victim = start(engine, model.tokenize("word " * 2000), max_tokens=500)
            wait_until(victim.has_started, "a slot is free")
            engine.abort(victim.sequence)
            assert isinstance(victim.outcome(), Aborted)
        run.generation()
        assert behind(engine, run) < ROUNDING


def test_a_waiting_sequence_can_be_aborted(engine: Engine) -> None:
    """It never gets its turn; the one that runs is not disturbed."""
    first, second = start(engine, max_tokens=100), start(engine)
    engine.abort(second.sequence)
    assert isinstance(second.outcome(), Aborted)
    assert second.texts == []
    assert first.generation().completion_tokens == 100


def test_close_aborts_everything(model: Model) -> None:
    """What runs and what waits gets the error."""
    with running(model) as engine:
        runs = [start(engine, max_tokens=N_CTX) for _ in range(3)]
        wait_until(lambda: runs[0].texts, "one is under way")
    assert [type(run.outcome()) for run in runs] == [Aborted] * 3


@pytest.mark.parametrize("prompt_tokens", [10, 63])
def test_the_end_of_the_context_ends_an_answer(model: Model, prompt_tokens: int) -> None:
    """Prompt and answer together fill it, then `length`; also when one token is left."""
    with running(model, n_ctx=64) as engine:
        prompt = model.tokenize("word " * 100)[:prompt_tokens]
        generation = start(engine, prompt, max_tokens=1000).generation()
    assert generation.finish_reason == "length"
    assert generation.prompt_tokens + generation.completion_tokens == 64


@both_ways
def test_more_sequences_than_slots_all_end(model: Model, batching: Batching, threads: int) -> None:
    """All end, whatever their lengths, with the tokens that each chooses alone; two at a time."""
    prompts = ["word " * count for count in (1, 700, 30, 5, 300, 2)]
    with running(model, slots=2, n_batch=128, threads=threads, batching=batching) as engine:
        runs = [start(engine, prompt, temperature=0) for prompt in prompts]
        assert [run.generation().completion_tokens for run in runs] == [20] * 6
    with running(model) as engine:
        for run in runs:
            assert behind(engine, run) < ROUNDING
        mixed = start(engine, prompts[1], temperature=0)
        mixed.generation()
        mixed.prompt = runs[0].prompt
        assert behind(engine, mixed) > 10 * ROUNDING  # what it would be if they mixed


def test_the_pieces_of_tokens_are_the_text(model: Model) -> None:
    """Lossless, also for characters of several tokens; only control tokens have no text."""
    text = "Grüße, 世界! 😀\n\tdone"
    tokens = model.tokenize(text)
    pieces = [model.piece(token) or b"" for token in tokens]
    assert b"".join(pieces).decode() == text
    assert max(map(len, pieces)) <= model.longest_token_bytes()
    (end,) = model.tokenize("<|im_end|>", add_special=False)
    assert model.piece(end) is None


def test_a_chat_goes_through_the_models_template(model: Model, tiny_base_model: Path) -> None:
    """A conversation becomes its prompt; a model without a template refuses it."""
    chat = ModelRequest(messages=[ChatMessage("user", "hi")])
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.tokenize_prompt(model.chat_prompt(chat).prompt) == model.tokenize(prompt)
    base = Model(tiny_base_model, 0)
    try:
        assert base.chat is None
        with pytest.raises(InvalidRequest, match="no chat template") as raised:
            base.chat_prompt(chat)
        assert raised.value.param == "messages"
    finally:
        base.close()


def test_a_corrupt_gguf_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A download that broke off: one sentence with the file and llama.cpp's reason."""
    broken = tmp_path / "broken.gguf"
    for size in (100, tiny_model.stat().st_size // 2):
        broken.write_bytes(tiny_model.read_bytes()[:size])
        with pytest.raises(ModelError) as raised:
            Model(broken, 0)
        assert str(raised.value).startswith(f"llama.cpp cannot load the model {broken}: ")
        assert "no reason given" not in str(raised.value)
        assert "\n" not in str(raised.value)


def test_an_answer_may_have_no_token(smollm2: Path) -> None:
    """The assistant's turn is complete already: the first token is the end, the text empty."""
    prompt = (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris."
    )
    model = Model(smollm2, 0)
    try:
        with running(model, n_ctx=256) as engine:
            run = start(engine, prompt, temperature=0)
            generation = run.generation()
    finally:
        model.close()
    assert (run.text, generation.finish_reason, generation.completion_tokens) == ("", "stop", 0)


@both_ways
@pytest.mark.parametrize("prompt_tokens", [3, 1500])
def test_growing_leaves_running_sequences_alone(
    model: Model, prompt_tokens: int, batching: Batching, threads: int
) -> None:
    """One under way, in its prompt or its answer, goes on in the larger context and comes out as
    it would have; then the new room takes three at once."""
    prompt = model.tokenize("word " * prompt_tokens)
    with running(model, n_batch=64, threads=threads) as alone:
        expected = answer(alone, prompt, max_tokens=600)
    with running(model, n_batch=64, threads=threads, batching=batching) as engine:
        first = start(engine, prompt, max_tokens=600)
        wait_until(lambda: first.sequence.position > 0, "it is under way")
        engine.grow(3).result(PATIENCE_S)
        first.generation()
        assert first.text == expected  # beside others its numbers would be rounded differently
        together = [start(engine, max_tokens=300) for _ in range(3)]
        wait_until(lambda: all(run.texts for run in together), "all three are under way")
        assert not any(run.done for run in together)


def test_growing_beyond_the_memory_changes_nothing(engine: Engine) -> None:
    """The caller gets the error, and what runs goes on."""
    first = start(engine, max_tokens=300)
    with pytest.raises(ModelError, match="no memory for 300 contexts"):
        engine.grow(300).result(PATIENCE_S)
    assert first.generation().completion_tokens == 300
    assert engine.slots == 1
