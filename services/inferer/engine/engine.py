"""llama.cpp on a thread of its own: all sequences under way go through the model in one batch.

With one slot this is the plain loop of decode and sample. With more, each step takes the next
token of every sequence that generates and fills the rest of the batch with prompts.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import llama_cpp

from services.inferer.crash.flight_recorder import Phase
from services.inferer.engine.context import NOT_SET, SET, Context
from services.inferer.engine.detokenizer import TextAssembler
from services.inferer.engine.model import Model, last_error
from services.inferer.engine.preparation import Preparation
from services.inferer.engine.sampler import Sampler
from shared.errors import InvalidRequest, ModelError, OutOfMemory, SluiceError

DECODED, ABORTED = 0, 2
NO_MEMORY = (1, -2)
"""No room in the context for the batch; a buffer that could not be had (`llama_decode`)."""


class Aborted(Exception):
    """The sequence was stopped from outside before it ended."""


@dataclass(frozen=True)
class Generation:
    """How a sequence ended, and where its time went (milliseconds)."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    prompt_ms: float
    generation_ms: float


@dataclass(eq=False)
class Sequence:
    """One prompt and what becomes of it. Its functions are called on other threads.

    ``prepare`` gives the prompt's tokens and a sampler, which is closed in the end; it may take
    its time, and is not stopped when the sequence is aborted. ``on_text``
    gets the text that each token added, possibly none; all of them together are the answer.
    ``on_phase`` gets what is being done for it, before it is done.
    ``on_end`` is called once, with a `Generation`, with `Aborted`, or with the `SluiceError` that
    ended it.
    """

    prepare: Callable[[], tuple[list[int], Sampler]]
    max_tokens: int
    stop: list[str]
    on_text: Callable[[str], None]
    on_end: Callable[[Generation | Exception], None]
    on_phase: Callable[[Phase], None] = lambda _: None

    prompt: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    aborted: bool = False
    slot: int = -1
    position: int = 0
    """Tokens that are in the context."""
    pending: deque[int] = field(default_factory=deque)
    """Tokens that must go through the model before the next can be sampled."""
    completion_tokens: int = 0
    started: float = 0.0
    prompt_done: float = 0.0
    text: TextAssembler = field(init=False)

    def __post_init__(self) -> None:
        self.text = TextAssembler(self.stop)


class Engine:
    """Runs up to ``slots`` sequences at a time; more wait for a slot in the order they came."""

    def __init__(self, model: Model, *, slots: int, n_ctx: int, n_batch: int, threads: int) -> None:
        """Make room for ``slots`` contexts of ``n_ctx`` tokens and start the compute thread.

        Raises:
            OutOfMemory: the context does not fit.
        """
        self.model = model
        self.n_ctx = n_ctx
        self.threads = threads
        self.slots = slots
        """Sequences that there is room for."""
        self.steps = 0
        """How often the compute thread has got through a batch, or whatever came in its place."""
        self._n_batch = min(n_batch, n_ctx)
        self._abort_flag = ctypes.create_string_buffer(2)
        self._context = self._create_context(slots)
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)
        # Each look at a field makes a new object, so once is enough.
        self._tokens, self._positions = self._batch.token, self._batch.pos
        self._slots, self._logits = self._batch.seq_id, self._batch.logits
        for row in range(self._n_batch):
            self._batch.n_seq_id[row] = 1
        self._free_slots = list(range(slots))
        self._growth: tuple[int, Future[None]] | None = None
        self._preparation = Preparation(slots)
        self._preparing: set[Sequence] = set()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._changed = threading.Condition()
        # Something to admit, abort or close: between two tokens there is seldom any.
        self._news = False
        self._closing = False
        # A daemon: a call into llama.cpp that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> dict[object, int]:
        """What is being worked at, with a number that changes when it gets on."""
        found = self._preparation.under_way
        if self._running or self._waiting or self._growth:
            found["compute"] = self.steps
        return found

    def submit(self, sequence: Sequence) -> None:
        """Prepare ``sequence``, then queue it; from any thread."""
        sequence.started = time.perf_counter()
        with self._changed:
            self._preparing.add(sequence)
        self._preparation.submit(lambda: self._prepare(sequence))

    def abort(self, sequence: Sequence) -> None:
        """End ``sequence`` with `Aborted`, also in the middle of its prompt; from any thread."""
        with self._changed:
            sequence.aborted = True
            if self._is_prepared(sequence):
                # A batch that is broken off must be taken out of every sequence in it. Where the
                # memory cannot do that, the abort waits for the end of the batch.
                if not self.model.is_recurrent:
                    self._abort_flag[0] = SET
                self._tell()
                return
        sequence.on_end(Aborted())

    def grow(self, slots: int) -> Future[None]:
        """Make room for ``slots`` sequences; those that run go on. From any thread, one at a time.

        The future raises `OutOfMemory` when the memory is short: then all stays as it was.
        """
        grown: Future[None] = Future()
        with self._changed:
            self._growth = (slots, grown)
            self._tell()
        return grown

    def close(self) -> bool:
        """Abort everything, wait for the thread and free the memory.

        False if a thread does not come back from llama.cpp: then the model is still in use.
        """
        with self._changed:
            self._closing = True
            preparing, self._preparing = self._preparing, set()
            for sequence in (*self._running, *self._waiting, *preparing):
                sequence.aborted = True
            if self._growth is not None:
                self._growth[1].cancel()
            self._abort_flag[0] = SET
            self._tell()
        for sequence in preparing:
            sequence.on_end(Aborted())
        self._thread.join(timeout=5)
        if self._thread.is_alive():
            return False
        llama_cpp.llama_batch_free(self._batch)
        self._context.close()
        # What is not begun yet finds that it is aborted.
        return not self._preparation.under_way

    def _tell(self) -> None:
        self._news = True
        self._changed.notify()

    def _create_context(self, slots: int) -> Context:
        return Context(
            self.model,
            slots=slots,
            n_ctx=self.n_ctx,
            n_batch=self._n_batch,
            threads=self.threads,
            abort_flag=self._abort_flag,
        )

    def _grow_if_asked(self) -> None:
        """Without the lock: it takes a while, and the event loop must not wait for it."""
        with self._changed:
            growth, self._growth = self._growth, None
        if growth is None:
            return
        slots, grown = growth
        if not grown.set_running_or_notify_cancel():
            return
        try:
            self._grow(slots)
        except Exception as error:
            why = error if isinstance(error, ModelError) else ModelError(f"no growth: {error!r}")
            grown.set_exception(why)
            return
        self._news = True  # whoever waits for a slot has one now
        grown.set_result(None)

    def _grow(self, slots: int) -> None:
        """Move into a larger context, with what the running sequences have in the present one."""
        larger = self._create_context(slots)
        try:
            self._preparation.grow(slots)
            larger.take_over(self._context, [sequence.slot for sequence in self._running])
        except BaseException:
            larger.close()
            raise
        self._context.close()
        self._context = larger
        self._free_slots += range(self.slots, slots)
        self.slots = slots

    def _run(self) -> None:
        while (self._running and not self._news) or self._admit():
            self._grow_if_asked()
            try:
                self._step()
            except Exception as error:
                # Whatever it was, the callers must hear of it, and the next job gets its chance.
                for sequence in list(self._running):
                    self._end(sequence, _failure("inference failed", error))
            self.steps += 1

    def _admit(self) -> bool:
        """Wait for work, drop what was aborted, fill free slots; False once closed and empty."""
        with self._changed:
            while True:
                self._news = False
                self._abort_flag[0] = NOT_SET
                for sequence in [s for s in (*self._running, *self._waiting) if s.aborted]:
                    self._end(sequence, Aborted())
                if self._closing:
                    return False
                while self._waiting and self._free_slots:
                    sequence = self._waiting.popleft()
                    sequence.slot = self._free_slots.pop()
                    self._running.append(sequence)
                    sequence.on_phase(Phase.PROMPT)
                if self._running or self._growth is not None:
                    return True
                self._changed.wait()

    def _step(self) -> None:
        """Put one batch through the model and sample for each sequence that is ready."""
        if not self._running:
            return
        taken = self._fill_batch()
        status = llama_cpp.llama_decode(self._context.handle, self._batch)
        if status != DECODED:
            self._undo(taken, status)
            return
        row = 0
        for sequence, count in taken:
            row += count
            sequence.position += count
            for _ in range(count):
                sequence.pending.popleft()
            if not sequence.pending:
                self._sample(sequence, row - 1)

    def _prepare(self, sequence: Sequence) -> None:
        """On a thread of its own; the sequence may be aborted meanwhile."""
        if sequence.aborted:
            return
        failure: Exception | None = None
        try:
            sequence.prompt, sequence.sampler = sequence.prepare()
        except SluiceError as error:
            failure = error
        except Exception as error:  # whatever native code stumbles over
            failure = _failure("the request could not be prepared", error)
        with self._changed:
            if self._is_prepared(sequence):  # aborted, and its caller knows
                if sequence.sampler is not None:
                    sequence.sampler.close()
                return
            if failure is None:
                sequence.pending.extend(sequence.prompt)
                self._waiting.append(sequence)
                self._tell()
        if failure is not None:
            sequence.on_end(failure)

    def _is_prepared(self, sequence: Sequence) -> bool:
        """Whether it is no longer being prepared; from now on it is not. Under the lock."""
        if sequence not in self._preparing:
            return True
        self._preparing.remove(sequence)
        return False

    def _fill_batch(self) -> list[tuple[Sequence, int]]:
        """Fill the batch, those that generate first; which sequence has how many tokens in it."""
        row, taken = 0, []
        for sequence in sorted(self._running, key=lambda running: len(running.pending)):
            count = min(len(sequence.pending), self._n_batch - row)
            if count == 0:
                break
            for offset in range(count):
                self._tokens[row] = sequence.pending[offset]
                self._positions[row] = sequence.position + offset
                self._slots[row][0] = sequence.slot
                self._logits[row] = False
                row += 1
            self._logits[row - 1] = count == len(sequence.pending)
            taken.append((sequence, count))
        self._batch.n_tokens = row
        return taken

    def _undo(self, taken: list[tuple[Sequence, int]], status: int) -> None:
        """Take a batch that did not go through out of the context again."""
        for sequence, _ in taken:
            removed = self._context.remove(sequence.slot, sequence.position)
            if status == ABORTED and not removed:
                self._end(sequence, ModelError("llama.cpp could not take a batch back"))
            elif status != ABORTED:
                kind = OutOfMemory if status in NO_MEMORY else ModelError
                why = f"llama.cpp's decode failed with status {status}: {last_error()}"
                self._end(sequence, kind(why))

    def _sample(self, sequence: Sequence, row: int) -> None:
        assert sequence.sampler is not None
        try:
            token = sequence.sampler.sample(self._context.handle, row)
        except InvalidRequest as error:
            self._end(sequence, error)
            return
        if sequence.completion_tokens == 0:
            sequence.prompt_done = time.perf_counter()
            sequence.on_phase(Phase.TOKENS)
        piece = self.model.piece(token)
        if piece is None:
            self._finish(sequence, "stop", "")
            return
        sequence.completion_tokens += 1
        text = sequence.text.push(piece)
        if sequence.text.stopped:
            self._finish(sequence, "stop", text)
        elif (
            sequence.completion_tokens >= sequence.max_tokens or sequence.position + 1 >= self.n_ctx
        ):
            self._finish(sequence, "length", text)
        else:
            sequence.pending.append(token)
            sequence.on_text(text)

    def _finish(self, sequence: Sequence, reason: Literal["stop", "length"], text: str) -> None:
        text += sequence.text.flush()
        if text:
            sequence.on_text(text)
        now = time.perf_counter()
        self._end(
            sequence,
            Generation(
                finish_reason=reason,
                prompt_tokens=len(sequence.prompt),
                completion_tokens=sequence.completion_tokens,
                prompt_ms=(sequence.prompt_done - sequence.started) * 1000,
                generation_ms=(now - sequence.prompt_done) * 1000,
            ),
        )

    def _end(self, sequence: Sequence, outcome: Generation | Exception) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._context.remove(sequence.slot, -1)
            self._free_slots.append(sequence.slot)
            self._news = True
        else:
            self._waiting.remove(sequence)
        if sequence.sampler is not None:
            sequence.sampler.close()
        sequence.on_end(outcome)


def _failure(what: str, error: Exception) -> ModelError:
    kind = OutOfMemory if isinstance(error, MemoryError) else ModelError
    return kind(f"{what}: {error!r}")
