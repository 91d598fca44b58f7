"""Models whose memory is not the usual one, with two slots: a cancel, and the same text."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted
from services.inferer.settings import Batching
from shared.errors import ModelError, SettingsError
from shared.wire.requests import Sampling
from tests.support.architectures import write_hybrid, write_mamba, write_rwkv, write_windowed
from tests.support.processes import eventually
from tests.support.tiny_model import write_tiny_model

PATIENCE_S = 60.0


class Run:
    def __init__(self, engine: Engine, text: str, max_tokens: int) -> None:
        self._ended: Future[Generation | Exception] = Future()
        self.texts: list[str] = []
        tokens = engine.model.tokenize(text)

        def prepare() -> tuple[list[int], list[Sampler]]:
            return tokens, [Sampler(engine.model, Sampling(temperature=0), 1, tokens)]

        self.sequence = GenerationSequence(
            prepare, max_tokens, [], self.texts.append, self._ended.set_result
        )
        engine.submit(self.sequence)

    def has_begun(self) -> bool:
        """Whether a batch with tokens of its prompt was computed."""
        return self.sequence.position > 0

    def has_text(self) -> bool:
        return bool(self.texts)

    def outcome(self) -> Generation | Exception:
        return self._ended.result(PATIENCE_S)

    def text(self) -> str:
        assert isinstance(self.outcome(), Generation), self.outcome()
        return "".join(self.texts)


@contextmanager
def running(model: Model, slots: int, batching: Batching = "on") -> Iterator[Engine]:
    engine = Engine(model, slots=slots, n_ctx=4096, n_batch=32, threads=1, batching=batching)
    try:
        yield engine
    finally:
        assert engine.close()


@pytest.mark.parametrize("batching", ["on", "off"])
@pytest.mark.parametrize("write", [write_hybrid, write_mamba, write_rwkv])
def test_a_cancel_fails_no_neighbour(
    write: Callable[[Path], Path], batching: Batching, tmp_path: Path
) -> None:
    """Whether it comes in the middle of its prompt or of its answer; the slot can be used again."""
    model = Model(write(tmp_path / "model.gguf"), 0)
    with running(model, slots=2, batching=batching) as engine:
        neighbour = Run(engine, "go on", 1000)
        for words, far in ((3000, False), (3, True), (3000, False), (3, True)):
            cancelled = Run(engine, "word " * words, 3000)
            if far:
                eventually(cancelled.has_text, "its first token")
            else:
                eventually(cancelled.has_begun, "the first batch")
            engine.abort(cancelled.sequence)
            assert isinstance(cancelled.outcome(), Aborted)
        assert neighbour.text()
        assert Run(engine, "go on", 100).text()
    model.close()


def test_longrope_writes_the_same_text_with_two_slots(tmp_path: Path) -> None:
    """Its factors are chosen by the size of one job's context, not of all together. A second slot
    opens while a job runs."""
    model = Model(write_tiny_model(tmp_path / "longrope.gguf", longrope_from=4096), 0)
    with running(model, slots=1) as engine:
        alone = Run(engine, "once upon a time", 300).text()
    with running(model, slots=2) as engine:
        # One after the other: two in a batch may be rounded differently.
        for _ in range(2):
            assert Run(engine, "once upon a time", 300).text() == alone
    with running(model, slots=1) as engine:
        run = Run(engine, "once upon a time", 300)
        eventually(lambda: run.texts or None, "its first token")
        engine.grow(2).result(PATIENCE_S)
        assert run.text() == alone
        assert Run(engine, "once upon a time", 300).text() == alone
    model.close()


def test_a_window_of_its_own_cannot_be_moved_to_a_larger_context(tmp_path: Path) -> None:
    """llama.cpp cannot, and that is said; when no job runs, the second slot opens."""
    model = Model(write_windowed(tmp_path / "window.gguf", original_context=4096), 0)
    with running(model, slots=1) as engine:
        run = Run(engine, "once upon a time", 300)
        eventually(lambda: run.texts or None, "its first token")
        with pytest.raises(ModelError, match="when no job runs"):
            engine.grow(2).result(PATIENCE_S)
        text = run.text()
        engine.grow(2).result(PATIENCE_S)
        assert Run(engine, "once upon a time", 300).text() == text
    model.close()


def test_a_window_of_its_own_is_moved_to_another_context(tmp_path: Path) -> None:
    """Where each sequence has a context of its own, it can be."""
    model = Model(write_windowed(tmp_path / "window.gguf", original_context=4096), 0)
    with running(model, slots=1, batching="off") as engine:
        alone = Run(engine, "once upon a time", 300).text()
        run = Run(engine, "once upon a time", 300)
        eventually(lambda: run.texts or None, "its first token")
        engine.grow(2).result(PATIENCE_S)
        assert run.text() == alone
        assert Run(engine, "once upon a time", 300).text() == alone
    model.close()


@pytest.mark.parametrize("gpu_layers", [0, 3])
def test_a_type_that_the_model_cannot_have_is_not_reported_as_too_little_memory(
    tiny_model: Path, gpu_layers: int
) -> None:
    """With layers on a GPU as without: its memory is not checked in advance, the type is. The model
    itself is on the CPU here."""
    model = Model(tiny_model, 0, chat=False)
    model.gpu_layers = gpu_layers
    try:
        with pytest.raises(SettingsError, match="INFERER_KV_TYPE=q8_0 is not possible"):
            Engine(model, slots=2, n_ctx=512, n_batch=32, threads=1, kv_type="q8_0")
    finally:
        model.close()
