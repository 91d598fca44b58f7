"""``python -m services.inferer.engine.self_test``: whether llama.cpp works here.

Reads ``INFERER_*`` as the inferer does, loads the same model and runs all kernels that jobs will
need: those for one token, a few and many, and for one output and a few, in a context of the same
size, and those of each adapter. A library that was compiled for another CPU, or wrongly, crashes
this process and not the inferer; `fitness` reads how it ended, and how fast it was.
"""

import os
import queue
import signal
import sys
import time
from collections.abc import Collection

import msgspec
import numpy

from services.inferer.engine.embedding_engine import EmbeddingEngine, EmbeddingRun, Pooled
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted, Sequence
from services.inferer.engine.set_up import load_model, start_embedding_engine, start_engine
from services.inferer.engine.speculation import MAX_DRAFTS, Speculation
from services.inferer.engine.speed import MeasuredSpeed, measured_speed
from services.inferer.settings import InfererSettings
from shared.config import load
from shared.errors import SluiceError
from shared.logs import configure_logs
from shared.model_files import locate
from shared.process.lifecycle import EXIT_CONFIGURATION
from shared.wire.requests import Sampling

WITHOUT_EXTRA_BUFFERS = "--without-extra-buffers"
LOADED = "loaded"
"""Printed when the model is loaded."""
ADAPTER = "adapter="
"""Printed with the name of an adapter before it is tested."""

FEW_TOKENS = 8
ALL_KERNELS = 72
"""Larger batches run the same kernels: the widest of llama.cpp takes 64 tokens. A few more are a
remainder."""
ANSWER_TOKENS = 9
TIME_LIMIT_S = 5.0
"""A longer test, of the model or of one adapter, is aborted: llama.cpp is slow here, but works."""
MIN_STALL_S = 10.0


class AllDrafts(Speculation):
    """Has all drafts checked, whatever it costs."""

    def counts(self, sequences: Collection[Sequence], room: int) -> list[int]:
        return [min(len(sequence.draft), room // len(sequences)) for sequence in sequences]

    def observe(self, sequences: int, drafts: int, seconds: float) -> None:
        pass


def main() -> int:
    configure_logs("inferer", stream=sys.stderr)  # stdout is for `fitness`
    try:
        settings = load(InfererSettings, "INFERER")
        extra_buffers = WITHOUT_EXTRA_BUFFERS not in sys.argv
        path = locate(settings.model)
        model = load_model(settings, path, extra_buffers=extra_buffers, chat=False)
        print(LOADED, flush=True)
        stall_s = max(settings.stall_s, MIN_STALL_S)
        _die_after(stall_s)
        if model.generates_text:
            engine = start_engine(settings, model, slots=settings.slots, speculation=AllDrafts())
            speed = _compute(engine, settings.n_batch)
            _compute_adapters(engine, settings.n_batch, stall_s)
        else:
            speed = _compute_inputs(start_embedding_engine(settings, model, slots=settings.slots))
        print(msgspec.json.encode(speed).decode())
    except SluiceError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIGURATION
    # The kernel frees the memory; freeing it here would take time.
    sys.stdout.flush()
    os._exit(0)


def _die_after(seconds: float) -> None:
    """SIGALRM ends a test that hangs, in llama.cpp or elsewhere."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _compute(engine: Engine, n_batch: int) -> MeasuredSpeed:
    """One token, one with drafts, a few in every slot, and a large batch, each by itself; the last
    goes on with a short answer, which is measured.

    Raises: SluiceError."""
    deadline = time.monotonic() + TIME_LIMIT_S
    drafts = MAX_DRAFTS if engine.speculates else 0
    for lengths, count in (([1], 0), ([1], drafts), ([FEW_TOKENS] * engine.slots, 0)):
        if not _decode(engine, lengths, deadline, drafts=count):
            return MeasuredSpeed()
    many = _decode(engine, [min(n_batch, ALL_KERNELS)], deadline, max_tokens=ANSWER_TOKENS)
    return measured_speed(many[0]) if many else MeasuredSpeed()


def _compute_adapters(engine: Engine, n_batch: int, stall_s: float) -> None:
    """One token and a large batch with each adapter, which has the time limits for itself: the
    result is cached, and one that was not tested would count as sound.

    Raises: SluiceError."""
    for adapter in engine.model.adapters:
        print(f"{ADAPTER}{adapter}", flush=True)
        _die_after(stall_s)
        deadline = time.monotonic() + TIME_LIMIT_S
        for length in (1, min(n_batch, ALL_KERNELS)):
            if not _decode(engine, [length], deadline, adapter=adapter):
                break


def _compute_inputs(engine: EmbeddingEngine) -> MeasuredSpeed:
    """An input of one token, a few short ones, and a long one, which is measured.

    Raises: SluiceError."""
    deadline = time.monotonic() + TIME_LIMIT_S
    speed = MeasuredSpeed()
    for lengths in ([1], [FEW_TOKENS] * FEW_TOKENS, [ALL_KERNELS]):
        ended: queue.SimpleQueue[Pooled | Exception] = queue.SimpleQueue()
        inputs = [
            numpy.array(_arbitrary(engine.model, min(n, engine.n_ctx)), numpy.int32)
            for n in lengths
        ]
        run = EmbeddingRun(lambda inputs=inputs: inputs, ended.put)  # type: ignore[misc]
        engine.submit(run)
        try:
            outcome = ended.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            engine.abort(run)
            return MeasuredSpeed()
        if isinstance(outcome, Exception):
            raise outcome
        speed = measured_speed(outcome)
    return speed


def _arbitrary(model: Model, length: int) -> list[int]:
    """So many tokens."""
    return [token % model.vocabulary.size for token in range(max(1, length))]


def _decode(
    engine: Engine,
    lengths: list[int],
    deadline: float,
    *,
    drafts: int = 0,
    max_tokens: int = 1,
    adapter: str = "",
) -> list[Generation]:
    """Compute prompts of ``lengths`` tokens at once, each with so many ``drafts``; nothing if
    ``deadline`` came before their end.

    Raises: SluiceError."""
    ended: queue.SimpleQueue[Generation | Exception] = queue.SimpleQueue()
    sequences = [
        _sequence(engine, min(length, engine.n_ctx - 1), max_tokens, ended) for length in lengths
    ]
    for sequence in sequences:
        sequence.is_cold = True  # no drafts of its own
        sequence.adapter = adapter
        sequence.draft = [0] * min(drafts, engine.n_ctx - 1)
        engine.submit(sequence)
    in_time = True
    generations = []
    for _ in sequences:
        try:
            outcome = ended.get(timeout=max(0, deadline - time.monotonic()) if in_time else None)
        except queue.Empty:
            in_time = False
            for sequence in sequences:
                engine.abort(sequence)
            outcome = ended.get()
        if isinstance(outcome, Exception) and not isinstance(outcome, Aborted):
            raise outcome
        if isinstance(outcome, Generation):
            generations.append(outcome)
    return generations if in_time else []


def _sequence(
    engine: Engine,
    length: int,
    max_tokens: int,
    ended: "queue.SimpleQueue[Generation | Exception]",
) -> GenerationSequence:
    """A prompt of ``length`` arbitrary tokens, and up to ``max_tokens`` of an answer."""
    prompt = _arbitrary(engine.model, length)
    return GenerationSequence(
        prepare=lambda: (prompt, [Sampler(engine.model, Sampling(temperature=0), 0, prompt)]),
        max_tokens=max_tokens,
        stop=[],
        on_text=lambda _: None,
        on_end=ended.put,
    )


if __name__ == "__main__":
    sys.exit(main())
