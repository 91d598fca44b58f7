"""Input that takes too much: the job ends by name, the process and the other jobs go on."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from services.inferer.bounded.chat_template import ChatTemplate
from services.inferer.engine.constraint import constraint
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import LONGEST_TEXT, Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted
from shared.bounded.process import Cancelled
from shared.errors import InvalidRequest, ModelError, PromptTooLong
from shared.wire.requests import ModelRequest, Sampling
from tests.support.processes import cpu_ticks, eventually
from tests.support.schemas import schema_format
from tests.support.tiny_model import write_tiny_model

PATIENCE_S = 120.0
MIB = 2**20


@contextmanager
def running(model: Model, slots: int = 1) -> Iterator[Engine]:
    engine = Engine(model, slots=slots, n_ctx=2048, n_batch=128, threads=1)
    try:
        yield engine
    finally:
        engine.close()


def run(engine: Engine, text: str, schema: Any = None, max_tokens: int = 40) -> tuple[Any, str]:
    """How a sequence ended, and its text."""
    ended: Future[Generation | Exception] = Future()
    texts: list[str] = []
    form = None if schema is None else schema_format(schema)
    options = ModelRequest(prompt="x", response_format=form, temperature=1.0)

    def prepare() -> tuple[list[int], list[Sampler]]:
        tokens = engine.model.tokenize(text)[:1000]
        grammar = constraint(engine.model, options)
        return tokens, [Sampler(engine.model, options, 7, tokens, grammar)]

    engine.submit(GenerationSequence(prepare, max_tokens, [], texts.append, ended.set_result))
    return ended.result(PATIENCE_S), "".join(texts)


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for level in range(levels):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}], "title": str(level)}
    return schema


ANSWERED = {
    "a long string": {"type": "string", "maxLength": 20_000},
    "a longer string": {"type": "string", "maxLength": 65_536},
    "no limit": {"type": "string", "maxLength": 2_147_483_647},
    "no limit at all": {"type": "string", "maxLength": 10**30},
    "a long array": {"type": "array", "items": {"type": "integer"}, "maxItems": 20_000},
    "no limit of items": {"type": "array", "items": {"type": "null"}, "maxItems": 2_147_483_647},
    "ambiguous": {"type": "string", "pattern": "^([a-z]?){40}$"},
    "ambiguous later": {"type": "string", "pattern": "^x([a-z]?){40}$"},
    "ambiguous stars": {"type": "string", "pattern": "^([a-z]*){40}$"},
    "a window": {"type": "string", "pattern": "^.*a.{40}$"},
    "a date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
    "any character": {"type": "string", "pattern": "^.{6,8}$"},
    "many words": {"enum": [f"word {number}" for number in range(3000)]},
    "long words": {"enum": ["x" * 10_000 + str(number) for number in range(3)]},
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            }
        },
    },
    "many properties": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string"} for number in range(600)},
    },
}
REFUSED = {
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "a circle of two": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "a huge repetition": {"type": "string", "pattern": "a{99999999999}"},
    "repetitions of repetitions": {"type": "string", "pattern": "^(((a{1000}){1000}){1000})$"},
    "many brackets": {"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000},
    "doubling": nested(18),
    "less doubling": nested(13),
    "not implemented": {"type": "array", "uniqueItems": True},
    "a large divisor": {"type": "integer", "multipleOf": 999_983},
    "a constant of many": {"const": list(range(100_000))},
    "patterns together": {
        "type": "string",
        "allOf": [
            {"pattern": f".*{letter}.{{{n}}}.*"} for n, letter in enumerate("abcdefghijklmnop")
        ],
    },
    "classes without case": {"type": "string", "pattern": "(?i)" + "[ -\uffff]" * 3000},
    "an enum of lists": {"enum": [[number] for number in range(20_000)]},
    "a contradiction": {"type": "string", "enum": [1]},
}


@pytest.mark.parametrize("schema", ANSWERED.values(), ids=ANSWERED)
def test_schemas_that_look_large_are_answered(model: Model, schema: dict[str, Any]) -> None:
    """Large bounds and ambiguous patterns cost little; an answer that ends is valid."""
    before = resident_bytes()
    with running(model) as engine:
        ended, text = run(engine, "answer:", schema)
    assert isinstance(ended, Generation), ended
    if ended.finish_reason == "stop":
        jsonschema_rs.validate(schema, json.loads(text))
    assert resident_bytes() - before < 300 * MIB


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_schemas_that_cannot_be_followed_are_refused_with_a_reason(
    model: Model, schema: dict[str, Any]
) -> None:
    """With the field and a reason; memory stays as it was, and the next job is served."""
    before = resident_bytes()
    with running(model) as engine:
        ended, _ = run(engine, "answer:", schema)
        assert isinstance(ended, InvalidRequest), ended
        assert ended.param == "response_format"
        assert len(str(ended)) > 20
        assert isinstance(run(engine, "go on")[0], Generation)
    assert resident_bytes() - before < 300 * MIB


def test_a_long_prompt_without_white_space_does_not_end_the_process(tmp_path: Path) -> None:
    """As long as any text may be, with a pre-tokenizer that recurses once for each character: the
    neighbour generates meanwhile, and a text that is longer is refused."""
    path = write_tiny_model(tmp_path / "tekken.gguf", metadata={"tokenizer.ggml.pre": "tekken"})
    model = Model(path, 0)
    with running(model, slots=2) as engine:
        long: Future[Any] = Future()
        threading.Thread(
            target=lambda: long.set_result(run(engine, "a" * 200_000)), daemon=True
        ).start()
        neighbours = 0
        while not long.done():
            assert isinstance(run(engine, "go on", max_tokens=5)[0], Generation)
            neighbours += 1
        assert neighbours > 1
        assert isinstance(long.result()[0], Exception | Generation)
        assert isinstance(run(engine, "a" * (LONGEST_TEXT + 1))[0], PromptTooLong)
    model.close()


def test_a_sequence_that_is_prepared_can_be_aborted(model: Model) -> None:
    """At once, whatever its preparation is still doing."""
    finish, ended = threading.Event(), Future[Generation | Exception]()

    def prepare() -> tuple[list[int], list[Sampler]]:
        finish.wait(PATIENCE_S)
        return [1], [Sampler(model, Sampling(), 1, [1])]

    with running(model, slots=2) as engine:
        sequence = GenerationSequence(prepare, 5, [], lambda _: None, ended.set_result)
        engine.submit(sequence)
        engine.abort(sequence)
        assert isinstance(ended.result(PATIENCE_S), Aborted)
        assert isinstance(run(engine, "go on")[0], Generation)
        finish.set()


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}"
HOSTILE += "{% if messages[0].content == 'memory' %}{{ 'x' * 10 ** 10 }}{% endif %}"
HOSTILE += "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
HOSTILE += "{{ messages[0].content }}"


def render(template: ChatTemplate, content: str, cancelled: threading.Event | None = None) -> str:
    messages = [{"role": "user", "content": content}]
    return template.render(messages, cancelled or threading.Event())


def test_a_template_that_takes_too_much_is_stopped() -> None:
    """Time or memory: refused with the field; the next conversation is rendered."""
    template = ChatTemplate(HOSTILE, "", "", render_s=2)
    for content in ("loop", "memory", "refuse"):
        with pytest.raises(InvalidRequest) as raised:
            render(template, content)
        assert raised.value.param == "messages"
        assert render(template, "hello") == "hello"
    assert render(template, "é" * 500_000) == "é" * 500_000
    template.close()


def test_a_render_can_be_cancelled() -> None:
    """It ends at once; meanwhile other conversations are rendered."""
    before = children()
    template = ChatTemplate(HOSTILE, "", "", render_s=PATIENCE_S)
    (process,) = children() - before
    cancelled, ended = threading.Event(), threading.Event()

    def loop() -> None:
        with pytest.raises(Cancelled):
            render(template, "loop", cancelled)
        ended.set()

    idle = cpu_ticks(process)
    threading.Thread(target=loop, daemon=True).start()
    eventually(lambda: cpu_ticks(process) > idle + 5, "it renders")
    assert render(template, "hello") == "hello"
    cancelled.set()
    assert ended.wait(PATIENCE_S / 2)
    template.close()


def test_conversations_that_come_together_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would take longer to start than they take."""
    monkeypatch.setattr("shared.bounded.process.BUSY_S", PATIENCE_S)
    before = children()
    template = ChatTemplate(HOSTILE, "", "")
    contents = [str(number) for number in range(100)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(partial(render, template), contents)) == contents
    assert len(children() - before) == 1
    template.close()
    assert children() == before


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def test_a_request_outlives_a_kill_of_its_process() -> None:
    """As the kernel does when memory runs out: the conversation is not to blame. Another process
    renders it; if that is killed as well, the attempt fails, and not the job."""
    before = children()
    template = ChatTemplate(HOSTILE, "", "", render_s=PATIENCE_S)
    with ThreadPoolExecutor(1) as threads:
        rendering = threads.submit(render, template, "loop")
        killed: set[int] = set()
        for _ in range(2):
            (process,) = eventually(
                lambda: children() - before - killed or None, "a process renders it"
            )
            idle = cpu_ticks(process)
            eventually(lambda: cpu_ticks(process) > idle + 20, "it renders")  # noqa: B023
            killed.add(process)
            os.kill(process, signal.SIGKILL)
        with pytest.raises(ModelError, match="memory"):
            rendering.result()
    assert render(template, "hello") == "hello"
    template.close()
    assert children() == before


def test_a_process_that_died_while_idle_is_replaced() -> None:
    """The next conversation is not to blame for it: another process renders it. Ctrl-C in a
    terminal, which is for the inferer, does not reach them."""
    before = children()
    template = ChatTemplate(HOSTILE, "", "")
    (idle,) = children() - before
    assert os.getsid(idle) != os.getsid(0)
    os.kill(idle, signal.SIGKILL)
    os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
    assert render(template, "hello") == "hello"
    template.close()
    assert children() == before


def test_the_engine_closes_while_a_request_is_prepared(tiny_model: Path) -> None:
    """The engine says that the model is still in use: it must not be freed under the thread. What
    is behind it in the queue is not begun any more."""
    loaded = Model(tiny_model, 0)
    begun, finish = threading.Event(), threading.Event()
    ended: list[Future[Generation | Exception]] = [Future(), Future()]
    behind: list[str] = []

    def prepare() -> tuple[list[int], list[Sampler]]:
        begun.set()
        assert finish.wait(PATIENCE_S)
        return [1], [Sampler(loaded, Sampling(), 1, [1])]

    def prepare_next() -> tuple[list[int], list[Sampler]]:
        behind.append("begun")
        return [1], [Sampler(loaded, Sampling(), 1, [1])]

    engine = Engine(loaded, slots=1, n_ctx=2048, n_batch=128, threads=1)
    engine.submit(GenerationSequence(prepare, 5, [], lambda _: None, ended[0].set_result))
    engine.submit(GenerationSequence(prepare_next, 5, [], lambda _: None, ended[1].set_result))
    assert begun.wait(PATIENCE_S)
    assert not engine.close()
    for end in ended:
        assert isinstance(end.result(PATIENCE_S), Aborted)
    finish.set()
    deadline = time.monotonic() + PATIENCE_S
    while engine.in_progress and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.in_progress
    assert not behind
    loaded.close()
