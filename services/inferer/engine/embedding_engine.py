"""Computes embeddings of inputs, or scores of documents: one request after the other, in turn.

The compute thread takes a batch of one request at a time, of as many inputs as fit. It knows no
slots: a request has no state between two batches but the outputs that it has already.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy

from services.inferer.crash.flight_recorder import Phase
from services.inferer.engine.context import (
    ABORTED,
    DECODED,
    NOT_SET,
    SET,
    ContextOptions,
    decode_error,
)
from services.inferer.engine.embedding_context import MAX_AT_ONCE, EmbeddingContext, Output
from services.inferer.engine.engine import CLOSE_S, model_error
from services.inferer.engine.inputs import Tokens
from services.inferer.engine.model import Model
from services.inferer.engine.preparation import Preparation
from services.inferer.engine.sequence import Aborted
from services.inferer.engine.thread_pool import ThreadPool
from services.inferer.settings import FlashAttention, KvType
from shared.errors import ModelError, SluiceError


@dataclass(frozen=True)
class Pooled:
    """What the model has made of the inputs of a request, and where the time went
    (milliseconds). Like a `Generation` without tokens."""

    outputs: list[Output]
    """For each input its embedding, of length 1, or an array of its score."""
    prompt_tokens: int
    prompt_ms: float
    prompt_delay_ms: float = 0.0
    """How much of that is due to other requests."""
    cached_tokens: int = field(default=0, init=False)
    completion_tokens: int = field(default=0, init=False)
    generation_ms: float = field(default=0.0, init=False)
    generation_delay_ms: float = field(default=0.0, init=False)


class EmbeddingRun:
    """The inputs of one request on their way through the model."""

    def __init__(
        self,
        prepare: Callable[[], list[Tokens]],
        on_end: Callable[[Pooled | Exception], None],
        on_phase: Callable[[Phase], None] = lambda _: None,
    ) -> None:
        """``prepare`` returns the tokens of each input, or raises `Aborted`. ``on_end`` is called
        once, on another thread: with `Pooled`, with `Aborted`, or with the `SluiceError` that ended
        the run. ``on_phase`` gets the phase before the first batch."""
        self.prepare = prepare
        self.on_end = on_end
        self.on_phase = on_phase
        self.inputs: list[Tokens] = []
        """Written by a preparation thread before the compute thread gets it, as ``ready``."""
        self.started = 0.0
        """`time.perf_counter`, as ``ready``."""
        self.ready = 0.0
        self.outputs: list[Output] = []
        """Used by the compute thread only, as ``delay_s``."""
        self.delay_s = 0.0

    def next_batch(self, tokens: int) -> list[Tokens]:
        """The next inputs: together at most so many ``tokens``, unless the first has more."""
        left = self.inputs[len(self.outputs) : len(self.outputs) + MAX_AT_ONCE]
        taken, total = 0, 0
        for one in left:
            total += len(one)
            if taken and total > tokens:
                break
            taken += 1
        return left[:taken]

    def result(self) -> Pooled:
        return Pooled(
            outputs=self.outputs,
            prompt_tokens=sum(map(len, self.inputs)),
            prompt_ms=(time.perf_counter() - self.started) * 1000,
            prompt_delay_ms=self.delay_s * 1000,
        )


class EmbeddingEngine:
    """Runs requests in turn, a batch of each. It has what the worker needs of an `Engine`."""

    has_cache = False
    step_s: Mapping[int, float] = {1: 1.0, 2: 2.0}
    """Nothing is gained by several at once: they share no batch."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        n_ctx: int,
        n_batch: int,
        threads: int,
        kv_type: KvType = "f16",
        flash_attention: FlashAttention = "auto",
    ) -> None:
        """Allocate a context for inputs of up to ``n_ctx`` tokens and start the compute thread.
        ``n_batch`` tokens of several inputs are computed at once, at most. ``slots`` is how many
        requests are expected at a time; it takes no memory.

        Raises:
            OutOfMemory: the context does not fit.
            SettingsError: this model cannot have such a context.
        """
        # Never written again.
        self.model = model
        self.n_ctx = n_ctx
        self.threads = threads
        self._n_batch = min(n_batch, n_ctx)
        self._preparation = Preparation(slots)

        # Under `_changed`.
        self._changed = threading.Condition()
        self._unfinished: set[EmbeddingRun] = set()
        self._ready: deque[EmbeddingRun] = deque()
        """Those that wait for their next batch."""
        self._current: EmbeddingRun | None = None
        """The one whose batch is being computed. Written by the compute thread; read without the
        lock by `in_progress`."""
        self._closing = False
        self._abort_flag = ctypes.create_string_buffer(2)
        """Set by `abort` and `close`, reset by the compute thread; llama.cpp reads it without the
        lock while it computes."""

        # Written by one thread, read by any.
        self.slots = slots
        self.steps = 0
        """Batches computed, or failed; a change shows progress."""

        # With layers on a GPU they would have little to do, and wait for it all the time.
        self._pool = None if model.gpu_layers else ThreadPool(threads)
        options = ContextOptions(n_ctx, self._n_batch, threads, kv_type, flash_attention)
        self._context = EmbeddingContext(model, options, self._abort_flag, self._pool)
        # A daemon: a call of llama.cpp that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def in_progress(self) -> dict[object, int]:
        """See `Engine.in_progress`."""
        counters = self._preparation.in_progress
        if self._current is not None:
            counters["compute"] = self.steps
        return counters

    @property
    def jobs_per_batch(self) -> None:
        """See `Engine.jobs_per_batch`."""
        return None

    def slowdowns(self, most: int) -> list[float]:
        """How many times as long a batch takes when 1, 2, … ``most`` requests take turns."""
        return [float(requests) for requests in range(1, most + 1)]

    def submit(self, run: EmbeddingRun) -> None:
        """Prepare ``run``, then queue it; from any thread. Once the engine is closed, it ends with
        `Aborted`."""
        run.started = time.perf_counter()
        with self._changed:
            self._unfinished.add(run)
            closed = self._closing
        if closed:
            self._end(run, Aborted())
        else:
            self._preparation.submit(lambda: self._prepare(run))

    def abort(self, run: EmbeddingRun) -> None:
        """End ``run`` with `Aborted`, also in the middle of a batch; from any thread."""
        with self._changed:
            is_unfinished = run in self._unfinished
            self._unfinished.discard(run)
            if run is self._current:
                self._abort_flag[0] = SET
        if is_unfinished:
            run.on_end(Aborted())

    def grow(self, slots: int) -> Future[None]:
        """Expect ``slots`` requests at a time. From any thread, one at a time."""
        grown: Future[None] = Future()
        try:
            self._preparation.grow(slots)
        except RuntimeError as error:
            grown.set_exception(ModelError(f"no thread could be started: {error}"))
        else:
            self.slots = slots
            grown.set_result(None)
        return grown

    def close(self) -> bool:
        """See `Engine.close`."""
        with self._changed:
            self._closing = True
            self._abort_flag[0] = SET
            unfinished = list(self._unfinished)
            self._changed.notify()
        for run in unfinished:
            self._end(run, Aborted())
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            return False
        self._context.close()
        if self._pool is not None:
            self._pool.close()
        return not self._preparation.in_progress

    def _end(self, run: EmbeddingRun, outcome: Pooled | Exception) -> None:
        """End it, unless it has ended; from any thread."""
        with self._changed:
            if run not in self._unfinished:
                return
            self._unfinished.remove(run)
        run.on_end(outcome)

    # Preparation threads

    def _prepare(self, run: EmbeddingRun) -> None:
        """The run may be aborted meanwhile."""
        try:
            run.inputs = run.prepare()
        except (Aborted, SluiceError) as error:
            self._end(run, error)
        except Exception as error:  # whatever native code raises
            self._end(run, model_error("the request could not be prepared", error))
        else:
            run.ready = time.perf_counter()
            with self._changed:
                self._ready.append(run)
                self._changed.notify()

    # The compute thread

    def _run(self) -> None:
        while (run := self._next()) is not None:
            try:
                self._step(run)
            except SluiceError as error:
                self._end(run, error)
            except Exception as error:
                # Its caller gets an error, and the engine goes on with the next run.
                self._end(run, model_error("the inputs could not be computed", error))
            self.steps += 1

    def _next(self) -> EmbeddingRun | None:
        """The run whose turn it is, once there is one; None once closed."""
        with self._changed:
            if (last := self._current) is not None and last in self._unfinished:
                self._ready.append(last)
            self._current = None
            while not self._closing:
                while self._ready:
                    run = self._ready.popleft()
                    if run in self._unfinished:
                        self._current = run
                        self._abort_flag[0] = NOT_SET
                        return run
                if self._pool is not None:
                    self._pool.pause()
                self._changed.wait()
            return None

    def _step(self, run: EmbeddingRun) -> None:
        """Compute the next batch of ``run``."""
        if not run.outputs:
            run.on_phase(Phase.INPUTS)
        started = time.perf_counter()
        status, outputs = self._context.compute(run.next_batch(self._n_batch))
        self._delay_others(started)
        if status == ABORTED:
            return  # it has ended
        if status != DECODED:
            self._end(run, decode_error(status))
            return
        run.outputs += map(self._finished, outputs)
        if len(run.outputs) == len(run.inputs):
            self._end(run, run.result())

    def _delay_others(self, started: float) -> None:
        """Those that waited had to, since ``started`` or since they were ready."""
        now = time.perf_counter()
        with self._changed:
            for other in self._ready:
                other.delay_s += now - max(started, other.ready)

    def _finished(self, output: Output) -> Output:
        """An embedding gets the length 1; a score is the first number, as the model has it."""
        if not numpy.isfinite(output).all():
            raise ModelError("the model computed something that is not a number")
        if "rerank" in self.model.tasks:
            return output[:1]
        length = float(numpy.sqrt(numpy.square(output, dtype=numpy.float64).sum()))
        return (output / length).astype(numpy.float32) if length else output
