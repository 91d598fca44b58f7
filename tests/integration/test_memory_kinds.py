"""Models whose memory is not the usual one, with two slots: a cancel, and the same text."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy
import pytest

from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted
from shared.errors import ModelError
from shared.wire.requests import Sampling
from tests.support.processes import eventually
from tests.support.tiny_model import copy_tokenizer, write_tiny_model

PATIENCE_S = 60.0
WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 64, 4


def write_hybrid(path: Path) -> Path:
    """LFM2: convolutions, whose state cannot be rewound, and attention in turn."""
    random = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS] * (LAYERS // 2))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_shortconv_l_cache(3)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocabulary = copy_tokenizer(writer, chat=False)

    def add(name: str, *shape: int, kind: type = numpy.float16) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(kind))

    def add_norm(name: str, width: int = WIDTH) -> None:
        writer.add_tensor(name, numpy.ones(width, dtype=numpy.float32))

    add("token_embd.weight", vocabulary, WIDTH)
    add_norm("token_embd_norm.weight")
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        add_norm(block + "attn_norm.weight")
        add_norm(block + "ffn_norm.weight")
        add(block + "ffn_gate.weight", HIDDEN, WIDTH)
        add(block + "ffn_up.weight", HIDDEN, WIDTH)
        add(block + "ffn_down.weight", WIDTH, HIDDEN)
        if layer % 2:
            add_norm(block + "attn_q_norm.weight", WIDTH // HEADS)
            add_norm(block + "attn_k_norm.weight", WIDTH // HEADS)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                add(f"{block}{name}.weight", WIDTH, WIDTH)
        else:
            add(block + "shortconv.conv.weight", WIDTH, 3, kind=numpy.float32)
            add(block + "shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            add(block + "shortconv.out_proj.weight", WIDTH, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Run:
    def __init__(self, engine: Engine, text: str, max_tokens: int) -> None:
        self._ended: Future[Generation | Exception] = Future()
        self.texts: list[str] = []
        tokens = engine.model.tokenize(text)

        def prepare() -> tuple[list[int], Sampler]:
            return tokens, Sampler(engine.model, Sampling(temperature=0), 1, tokens)

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
def running(model: Model, slots: int) -> Iterator[Engine]:
    engine = Engine(model, slots=slots, n_ctx=4096, n_batch=32, threads=1)
    try:
        yield engine
    finally:
        assert engine.close()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write_hybrid(tmp_path_factory.mktemp("hybrid") / "lfm2.gguf"), 0)
    yield model
    model.close()


def test_a_cancel_fails_no_neighbour_on_a_hybrid(hybrid: Model) -> None:
    """Whether it comes in the middle of its prompt or of its answer; the slot can be used again."""
    with running(hybrid, slots=2) as engine:
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


def test_longrope_writes_the_same_text_with_two_slots(tmp_path: Path) -> None:
    """Its factors are chosen by the size of one job's context, not of all together. A
    second slot opens when no job runs: llama.cpp cannot move one there, and that is said."""
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
        with pytest.raises(ModelError, match="when no job runs"):
            engine.grow(2).result(PATIENCE_S)
        assert run.text() == alone
        engine.grow(2).result(PATIENCE_S)
        assert Run(engine, "once upon a time", 300).text() == alone
    model.close()
