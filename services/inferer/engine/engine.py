"""The compute thread, and the hand-over between it and other threads.

The scheduler decides which tokens of the running sequences are computed next (`scheduler.py`). One
context has the memory of all sequences (`context.py`), or each has a context of its own
(`separate_contexts.py`); then part of a prompt may be computed in the background of the others
(`background_prompt.py`). Each sequence handles its own outputs (`generation.py`).
"""

import ctypes
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

from services.inferer.crash.flight_recorder import Phase
from services.inferer.engine.background_prompt import BackgroundPrompt
from services.inferer.engine.batching import MOST_SEPARATE, separate_is_faster
from services.inferer.engine.context import (
    ABORTED,
    DECODED,
    NOT_SET,
    SET,
    Context,
    ContextOptions,
    EngineMemory,
    decode_error,
)
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.lookup import Answers, Lookup
from services.inferer.engine.model import Model
from services.inferer.engine.preparation import Preparation
from services.inferer.engine.prompt_cache import MOST_MOVED, PromptCache
from services.inferer.engine.scheduler import Chunk, Scheduler
from services.inferer.engine.separate_contexts import SeparateContexts
from services.inferer.engine.sequence import Aborted, State
from services.inferer.engine.speculation import Speculation
from services.inferer.engine.thread_pool import ThreadPools
from services.inferer.settings import Batching, FlashAttention, KvType
from shared.errors import InvalidRequest, ModelError, OutOfMemory, SluiceError

CLOSE_S = 5.0
"""How long the compute thread may take to return from llama.cpp."""

REST_S = 0.001
"""How long nothing is computed after the first token of an answer. Where all cores compute, each of
the four processes that it passes waits for one (decision 39)."""


class Engine:
    """Runs up to ``slots`` sequences at a time; more wait for a slot, in order of arrival."""

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
        batching: Batching = "on",
        expected_slots: int = 1,
        cache_bytes: int = 0,
        shares_cache: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        """Allocate ``slots`` contexts of ``n_ctx`` tokens and start the compute thread. With
        ``batching="auto"``, what is faster is measured now if there are several slots, or
        ``expected_slots`` will open later; otherwise when the second slot opens.
        ``cache_bytes`` of host memory are for what earlier sequences have computed; 0 means that
        nothing is reused, and no token is guessed from their answers. ``shares_cache``: for
        sequences of other owners too. ``speculation`` decides how many guessed tokens are checked
        at once; with None no token is guessed.

        Raises:
            OutOfMemory: the context does not fit.
            SettingsError: this model cannot have such a context.
        """
        # Never written again.
        self.model = model
        self.n_ctx = n_ctx
        self.threads = threads
        self.shares_cache = shares_cache
        self.has_cache = cache_bytes > 0
        self._options = ContextOptions(
            n_ctx,
            n_batch=min(n_batch, n_ctx),
            threads=threads,
            kv_type=kv_type,
            flash_attention=flash_attention,
        )
        self._batching = batching
        self._expected_slots = expected_slots
        self._preparation = Preparation(slots)

        # Handed over between threads, under `_changed`.
        self._changed = threading.Condition()
        self._preparing: set[GenerationSequence] = set()
        """Written by any thread but the compute thread."""
        self._prepared: list[GenerationSequence] = []
        """Added to by preparation threads, taken by the compute thread."""
        self._growth: tuple[int, Future[None]] | None = None
        """Written by `grow`, taken by the compute thread."""
        self._closing = False
        """Written by `close`, read by the compute thread."""
        self._notified = False
        """Whether any of this has changed: set by any thread, reset by the compute thread, which
        also reads it without the lock, as `in_progress` does."""
        self._growing = False
        """Whether a growth has begun. Written by the compute thread, read by any."""
        self._may_interrupt = True
        """Whether an abort may break off the current batch. It may not break off two in a row:
        otherwise a series of aborts could stop the progress of all other sequences. Written by the
        compute thread, read by any."""
        self._abort_flag = ctypes.create_string_buffer(2)
        """Set by `abort` and `close`, reset by the compute thread; llama.cpp reads it without the
        lock while it decodes."""

        # Written by the compute thread, read by any thread.
        self.slots = slots
        """Sequences that the context has memory for."""
        self.steps = 0
        """Batches computed, or failed; a change shows progress."""

        # Used by the compute thread only, except that `in_progress` reads whether the scheduler is
        # idle, `jobs_per_batch` a constant of `_memory`, that preparation threads hand `_answers`
        # over, and that `close` frees the context when the thread has ended.
        self._scheduler: Scheduler[GenerationSequence] = Scheduler(
            slots, self._options.n_batch, speculation
        )
        # With layers on a GPU they would have little to do, and wait for it all the time.
        self._pools = None if model.gpu_layers else ThreadPools(threads)
        self._separate_is_faster: bool | None = None
        """As measured for several slots; None before."""
        if self._pools is not None and max(slots, expected_slots) > 1:
            self._is_separate(slots, self._pools)
        self._memory = self._create_memory(slots)
        self._cache = PromptCache(self._memory, cache_bytes)
        self._answers = Answers() if self.has_cache else None
        self._background = BackgroundPrompt(self._background_ended)
        self._has_only_background = False
        """Whether there is nothing to compute until it has ended."""
        self._failed_move: tuple[GenerationSequence, int] | None = None
        """The last one that failed; it is not tried again while the scheduler proposes it."""
        # Never written again.
        self._can_undo = self._memory.can_undo
        self.speculates = speculation is not None and self._can_undo

        # A daemon: a call of llama.cpp that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def in_progress(self) -> dict[object, int]:
        """A counter for each thread that has work; it changes when the thread makes progress.

        Takes no lock: a thread that hangs may hold it.
        """
        counters = self._preparation.in_progress
        if self._notified or self._growing or not self._scheduler.is_idle:
            counters["compute"] = self.steps
        if self._background.chunk is not None:
            counters["background"] = self._background.chunks
        return counters

    @property
    def step_s(self) -> Mapping[int, float]:
        """Seconds of a step by the number of sequences that generate, where it was measured
        lately."""
        return self._scheduler.step_times.seconds

    @property
    def jobs_per_batch(self) -> int | None:
        """If more sequences generate, not all of them are in each batch. None if all are."""
        return self._memory.most_at_once

    def slowdowns(self, most: int) -> list[float]:
        """How many times as long a token takes on average while 1, 2, … ``most`` sequences
        generate."""
        slowdowns = self._scheduler.step_times.slowdowns(most, self.jobs_per_batch)
        return [round(slowdown, 3) for slowdown in slowdowns]

    def submit(self, sequence: GenerationSequence) -> None:
        """Prepare ``sequence``, then queue it; from any thread. Once the engine is closed, it ends
        with `Aborted`."""
        sequence.started = time.perf_counter()
        with self._changed:
            closed = self._closing
            if not closed:
                self._preparing.add(sequence)
        if closed:
            sequence.on_end(Aborted())
        else:
            self._preparation.submit(lambda: self._prepare(sequence))

    def abort(self, sequence: GenerationSequence) -> None:
        """End ``sequence`` with `Aborted`, also in the middle of its prompt; from any thread."""
        with self._changed:
            sequence.aborted = True
            if self._is_prepared(sequence):
                # A batch that is aborted must be removed from all sequences in it. Where the
                # memory cannot do that, the abort waits for the end of the batch.
                is_in_batch = sequence.state is State.RUNNING and (
                    sequence is not self._background.sequence
                )
                if is_in_batch and self._can_undo and self._may_interrupt:
                    self._abort_flag[0] = SET
                self._notify()
                return
        sequence.on_end(Aborted())

    def grow(self, slots: int) -> Future[None]:
        """Make room for ``slots`` sequences; running ones go on. From any thread, one at a time.

        The future raises `OutOfMemory` if there is too little memory: then nothing has changed.
        Once the engine is closed, it is cancelled.
        """
        grown: Future[None] = Future()
        with self._changed:
            if self._closing:
                grown.cancel()
            else:
                self._growth = (slots, grown)
                self._notify()
        return grown

    def close(self) -> bool:
        """Abort everything, wait for the compute thread and free the context.

        False if a thread does not return from llama.cpp: then the model is still in use.
        """
        with self._changed:
            self._closing = True
            preparing, self._preparing = self._preparing, set()
            for sequence in preparing:
                sequence.aborted = True
            if self._growth is not None:
                self._growth[1].cancel()
            self._abort_flag[0] = SET
            self._notify()
        for sequence in preparing:
            sequence.on_end(Aborted())
        self._thread.join(timeout=CLOSE_S)
        if self._thread.is_alive():
            return False
        self._memory.close()
        if self._pools is not None:
            self._pools.close()
        # Preparations that have not begun will find their sequences aborted.
        return not self._preparation.in_progress

    def _notify(self) -> None:
        """Under the lock."""
        self._notified = True
        self._changed.notify()

    # Preparation threads

    def _prepare(self, sequence: GenerationSequence) -> None:
        """The sequence may be aborted meanwhile."""
        if sequence.aborted:
            return
        failure: Exception | None = None
        try:
            prompt, sequence.samplers = sequence.prepare()
            sequence.tokens = list(prompt)
            if self.speculates and not sequence.is_cold:
                answers = None if sequence.is_repeatable else self._answers
                sequence.lookup = Lookup(sequence.tokens, answers, sequence.cache_key)
        except SluiceError as error:
            failure = error
        except Exception as error:  # whatever native code raises
            failure = model_error("the request could not be prepared", error)
        sequence.prompt_tokens = len(sequence.tokens)
        sequence.max_tokens = min(sequence.max_tokens, self.n_ctx - sequence.prompt_tokens)
        with self._changed:
            if self._is_prepared(sequence):  # aborted, and its caller was notified
                sequence.close()
                return
            if failure is None:
                self._prepared.append(sequence)
                self._notify()
        if failure is not None:
            sequence.on_end(failure)

    def _is_prepared(self, sequence: GenerationSequence) -> bool:
        """Whether its preparation had already ended. Marks it as ended. Under the lock."""
        if sequence not in self._preparing:
            return True
        self._preparing.remove(sequence)
        return False

    # The compute thread

    def _run(self) -> None:
        while self._receive():
            try:
                self._step()
                if self._scheduler.is_idle:
                    self._idle()
            except Exception as error:
                self._drop_background()
                # These callers get an error, and the engine goes on with the next sequences.
                for sequence in self._scheduler.running:
                    self._fail(sequence, model_error("inference failed", error))
            self.steps += 1

    def _receive(self) -> bool:
        """Take over what other threads have handed over, and wait for it if there is nothing to
        compute; False once closed."""
        is_waiting = self._scheduler.is_idle or self._has_only_background
        if not self._notified and not is_waiting:
            return True  # between two tokens there is seldom anything
        with self._changed:
            while not self._notified:
                self._changed.wait()
            for sequence in self._prepared:
                self._scheduler.add(sequence)
            self._prepared = []
            growth, self._growth = self._growth, None
            closing = self._closing
            self._growing = growth is not None
            self._abort_flag[0] = NOT_SET
            self._notified = False
        background = self._background.sequence
        if background and (background.aborted or closing or growth is not None):
            # Only one that goes on must be undone; its context has nothing of others.
            if background.aborted or closing or self._can_undo:
                self._background.abort()
            self._end_background()
        for sequence in self._scheduler:
            if sequence.aborted or closing:
                self._end(sequence, Aborted())
        if growth is not None:
            if not closing:
                self._grow(*growth)
            self._growing = False
        return not closing

    def _step(self) -> None:
        """Schedule a batch, compute it, and hand its outputs over."""
        self._has_only_background = False
        if self._background.has_ended:
            self._end_background()
        if self._background.chunk is None:
            # Prompts wait for it anyway, and it may be computing what they begin with.
            self._admit()
        self._close_gaps()
        self._begin_background()
        batch = self._scheduler.next_batch(self._memory.at_once)
        if not batch:
            self._has_only_background = self._background.chunk is not None
            return
        started = time.perf_counter()
        status = self._memory.decode(batch)
        seconds = time.perf_counter() - started
        self._may_interrupt = status != ABORTED
        if status == DECODED:
            outputs = self._scheduler.complete(batch, seconds)
            for sequence, *_ in batch:
                self._save_checkpoint(sequence)
            self._hand_over(outputs)
        elif status == ABORTED:
            self._undo(batch)
        else:
            for chunk in batch:
                self._fail(chunk.sequence, decode_error(status))

    def _begin_background(self) -> None:
        if self._memory.has_background:
            chunk = self._scheduler.next_in_background()
            if chunk is not None:
                self._background.begin(chunk, self._memory)

    def _background_ended(self) -> None:
        """On another thread."""
        with self._changed:
            self._notify()

    def _end_background(self) -> None:
        """Wait for what is computed in the background, and hand its output over. An error ends its
        sequence only."""
        chunk, outcome = self._background.take()
        self._memory.end_background()
        sequence = chunk.sequence
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if outcome == DECODED:
                self._scheduler.complete_in_background(chunk, self._background.seconds)
                self._save_checkpoint(sequence)
                if chunk.has_output:
                    self._hand_over([chunk])
            else:
                self._scheduler.drop_background()
                self._undo([chunk])
        except Exception as error:  # `_receive` must not raise it
            self._scheduler.drop_background()
            if sequence.state is State.RUNNING:
                is_known = isinstance(error, ModelError)
                self._fail(sequence, error if is_known else model_error("inference failed", error))

    def _drop_background(self) -> None:
        """End what is computed in the background, or what failed to begin; nothing of it counts."""
        if self._background.chunk is not None:
            self._background.abort()
            self._background.take()
        if self._memory.has_background:
            self._memory.end_background()
        self._scheduler.drop_background()

    def _admit(self) -> None:
        """Give the free slots to sequences that wait, with what is known of their prompts."""
        while (sequence := self._scheduler.next_waiting) is not None:
            try:
                slot, sequence.cached_tokens = self._cache.place(
                    sequence, self._scheduler.free_slots, self._scheduler.running
                )
            except Exception as error:
                # Only this one: it would be the next again, and fail again.
                self._end(sequence, model_error("no slot could be prepared", error))
                continue
            self._scheduler.admit(slot, sequence.cached_tokens)
            if not (sequence.is_last_choice or self._memory.can_copy):
                sequence.checkpoint = sequence.prompt_tokens - 1
                self._save_checkpoint(sequence)
            sequence.on_phase(Phase.PROMPT)

    def _save_checkpoint(self, sequence: GenerationSequence) -> None:
        """Save what a sequence has in the context, if this is where it should be saved."""
        if not 0 < sequence.checkpoint == sequence.position:
            return
        if sequence.is_last_choice:
            self._cache.save_checkpoint(sequence)
        else:
            sequence.start = self._cache.copy_of(sequence.slot)

    def _hand_over(self, outputs: list[Chunk[GenerationSequence]]) -> None:
        first = [chunk.sequence for chunk in outputs if not chunk.sequence.prompt_done]
        for chunk in outputs:
            self._advance(chunk)
        if any(sequence.state is State.RUNNING for sequence in first):
            self._rest()

    def _rest(self) -> None:
        """Leave the cores to the processes that a first token passes on its way to its caller."""
        if self._pools is not None:
            self._pools.pause()
            time.sleep(REST_S)

    def _idle(self) -> None:
        """Leave the cores to others, but save what the slots hold until there is something to
        compute."""
        if self._pools is not None:
            self._pools.pause()
        while not self._notified and self._cache.save_ahead(self._scheduler.free_slots):
            pass

    def _close_gaps(self) -> None:
        """Move sequences to adjacent slots: llama.cpp computes only those together."""
        while self._memory.must_be_adjacent and self._memory.can_copy:
            move = self._scheduler.next_move(MOST_MOVED)
            if move is None or move == self._failed_move:
                return
            sequence, slot = move
            try:
                is_moved = self._cache.move(sequence, slot)
            except Exception as error:
                self._fail(sequence, model_error("it could not be moved to another slot", error))
                continue
            if not is_moved:
                self._failed_move = move
                return
            self._scheduler.move(sequence, slot)

    def _undo(self, batch: list[Chunk[GenerationSequence]]) -> None:
        """Remove an aborted batch from the context; those that go on repeat their part."""
        for sequence, *_ in batch:
            if not self._memory.truncate(sequence.slot, sequence.position):
                error = ModelError("llama.cpp could not undo an aborted batch")
                is_aborted = sequence.aborted or self._closing
                self._fail(sequence, Aborted() if is_aborted else error)

    def _advance(self, chunk: Chunk[GenerationSequence]) -> None:
        """Hand over the output of a chunk's last token, then those of its draft as far as it is
        right, and remove the rest of the draft from the context."""
        sequence = chunk.sequence
        failure: InvalidRequest | None = None
        has_ended = False
        try:
            context, last_row = self._memory.output(sequence.slot)
            has_ended = sequence.advance(self.model, context, last_row)
            for row, token in enumerate(chunk.draft, last_row + 1):
                if has_ended or sequence.tokens[-1] != token:
                    break
                sequence.position += 1
                has_ended = sequence.advance(self.model, context, row)
        except InvalidRequest as error:
            failure = error
        if chunk.draft and not self._memory.truncate(sequence.slot, sequence.position):
            self._fail(sequence, ModelError("llama.cpp could not remove a wrong draft"))
        elif failure is not None:
            self._end(sequence, failure)
        elif has_ended and sequence.is_last_choice:
            self._end(sequence, sequence.generation())
        elif has_ended:
            sequence.begin_next_choice()
            # The output after the prompt is needed once more.
            length = sequence.prompt_tokens - 1
            sequence.position = self._cache.rewind(sequence, length, sequence.start)

    def _end(self, sequence: GenerationSequence, outcome: Generation | Exception) -> None:
        if sequence.state is State.RUNNING:
            self._cache.leave(sequence)
        self._scheduler.remove(sequence)
        sequence.close()
        sequence.on_end(outcome)

    def _fail(self, sequence: GenerationSequence, error: Exception) -> None:
        """End a sequence of which the context may hold anything."""
        self._memory.truncate(sequence.slot, 0)
        sequence.position = 0
        self._end(sequence, error)

    def _grow(self, slots: int, grown: Future[None]) -> None:
        # Without the lock: it takes a while, and the event loop must not wait for it.
        if not grown.set_running_or_notify_cancel():
            return
        try:
            self._move_to_context(slots)
        except Exception as error:
            grown.set_exception(
                error
                if isinstance(error, ModelError)
                else ModelError(f"the context could not be enlarged: {error!r}")
            )
            return
        self._scheduler.grow(slots)
        self.slots = slots
        grown.set_result(None)

    def _move_to_context(self, slots: int) -> None:
        """Replace the context by one for ``slots`` sequences, with the memory of those running."""
        larger = self._create_memory(slots)
        try:
            self._preparation.grow(slots)
            for sequence in self._scheduler.running:
                if not larger.take_over(self._memory, sequence.slot, sequence.slot):
                    raise ModelError(
                        "llama.cpp cannot move this model's running jobs to a larger context; try "
                        "again when no job runs"
                    )
            for slot in self._cache.kept_slots:
                if not larger.take_over(self._memory, slot, slot):
                    self._cache.forget(slot)
        except BaseException:
            larger.close()
            raise
        self._memory.close()
        self._memory = self._cache.memory = larger

    def _create_memory(self, slots: int) -> EngineMemory:
        if slots > 1 and self._pools is not None and self._is_separate(slots, self._pools):
            try:
                return SeparateContexts(
                    self.model, slots, self._options, self._abort_flag, self._pools
                )
            except OutOfMemory:
                if self._batching == "off":
                    raise
        return self._one_context(slots)

    def _is_separate(self, slots: int, pools: ThreadPools) -> bool:
        """Whether each slot has a context of its own. What is faster is measured once."""
        if self._batching != "auto":
            return self._batching == "off"
        if slots > MOST_SEPARATE:
            return False
        if self._separate_is_faster is None:
            most = max(slots, self._expected_slots)
            self._separate_is_faster = separate_is_faster(self.model, most, self._options, pools)
        return self._separate_is_faster

    def _one_context(self, slots: int) -> Context:
        pool = self._pools.all if self._pools else None
        return Context(self.model, slots, self._options, self._abort_flag, pool)


def model_error(what: str, error: Exception) -> ModelError:
    """The error for whatever was raised while ``what`` was tried."""
    kind = OutOfMemory if isinstance(error, MemoryError) else ModelError
    return kind(f"{what}: {error!r}")
