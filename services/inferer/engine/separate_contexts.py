"""A context for each slot: sequences are computed side by side, each with its share of the threads.

For a small model, where threads wait for each other after each of hundreds of short operations, two
sequences are ready sooner like this than in one batch (decision 58).
"""

import ctypes
import threading
from collections.abc import Callable, Collection
from queue import SimpleQueue

from services.inferer.engine.context import (
    DECODED,
    Context,
    ContextOptions,
    EngineMemory,
    require_memory,
)
from services.inferer.engine.model import Model
from services.inferer.engine.native_log import forget_problems
from services.inferer.engine.prompt_cache import SavedState
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.thread_pool import ThreadPools

MOST_IDLE = 1.2
"""How many times as long as with all threads busy until the end prompts may take that are computed
side by side. If longer, each gets all threads: to divide them gains about as much."""


class SeparateContexts(EngineMemory):
    """``slots`` contexts with one slot each. A batch has at most `at_once` sequences that generate,
    and as many prompts."""

    must_be_adjacent = False

    def __init__(
        self,
        model: Model,
        slots: int,
        options: ContextOptions,
        abort_flag: ctypes.Array[ctypes.c_char],
        pools: ThreadPools,
    ) -> None:
        """See `Context`. The threads of ``pools`` are divided among the contexts that compute."""
        require_memory(model, slots, options, are_separate=True)
        self._pools = pools
        self._abort_flag = abort_flag
        self.most_at_once = self.at_once = pools.threads
        self.has_background = pools.threads > 1
        self._helpers = _Helpers(min(slots, pools.threads) - 1)
        self._contexts: list[Context] = []
        try:
            for _ in range(slots):
                self._contexts.append(Context(model, 1, options, abort_flag, pools.all))
        except BaseException:
            self.close()
            raise
        self.can_copy = self._contexts[0].can_copy
        self.can_undo = self._contexts[0].can_undo

    def decode(self, batch: Collection[Chunk[Sequence]]) -> int:
        forget_problems()
        for chunk in batch:
            slot = chunk.sequence.slot
            self._contexts[slot].fill((chunk,), first_slot=slot)
        generating = [chunk for chunk in batch if chunk.sequence.remaining == 1]
        prompts = [chunk for chunk in batch if chunk.sequence.remaining > 1]
        status = self._compute(generating)
        sizes = [chunk.size for chunk in prompts]
        is_divided = keeps_threads_busy(sizes, self._pools.free)
        for chunks in [prompts] if is_divided else [[chunk] for chunk in prompts]:
            if status == DECODED:
                status = self._compute(chunks)
        if prompts and len(batch) > 1:
            # The next batch is divided: where a thread still waits for work, the kernel would put
            # two of the others on one core.
            self._pools.pause()
        return status

    def _compute(self, chunks: Collection[Chunk[Sequence]]) -> int:
        """Compute all of them at the same time. The first status that is not `DECODED`, if any."""
        if not chunks:
            return DECODED
        slots = [chunk.sequence.slot for chunk in chunks]
        contexts = [self._contexts[slot] for slot in slots]
        for context, pool in zip(contexts, self._pools.for_slots(slots), strict=True):
            context.use(pool, self._abort_flag)
        statuses = self._helpers.run([context.compute for context in contexts])
        return next((status for status in statuses if status != DECODED), DECODED)

    def begin_background(
        self, chunk: Chunk[Sequence], abort_flag: ctypes.Array[ctypes.c_char]
    ) -> Callable[[], int]:
        slot = chunk.sequence.slot
        context = self._contexts[slot]
        context.fill((chunk,), first_slot=slot)
        context.use(self._pools.reserve(slot, self._pools.threads // 2), abort_flag)
        self.at_once = self._pools.free
        return context.compute

    def end_background(self) -> None:
        self._pools.release()
        self.at_once = self._pools.free

    def output(self, slot: int) -> tuple[object, int]:
        return self._contexts[slot].output(0)

    def length(self, slot: int) -> int:
        return self._contexts[slot].length(0)

    def shortest(self, slot: int) -> int:
        return self._contexts[slot].shortest(0)

    def truncate(self, slot: int, length: int) -> bool:
        return self._contexts[slot].truncate(0, length)

    def state_bytes(self, slot: int) -> int:
        return self._contexts[slot].state_bytes(0)

    def save(self, slot: int) -> SavedState | None:
        return self._contexts[slot].save(0)

    def load(self, slot: int, state: SavedState) -> bool:
        return self._contexts[slot].load(0, state)

    def close(self) -> None:
        self._helpers.close()
        for context in self._contexts:
            context.close()


def keeps_threads_busy(sizes: Collection[int], threads: int) -> bool:
    """Whether all ``threads`` would have something to do until the end, or nearly, if prompts of
    these ``sizes`` were computed side by side; there are no more of them than threads."""
    if len(sizes) < 2:
        return False
    threads_of_each = threads // len(sizes)
    return max(sizes) * threads <= MOST_IDLE * sum(sizes) * threads_of_each


class _Helpers:
    """Threads that work beside the calling one."""

    def __init__(self, count: int) -> None:
        self._work: SimpleQueue[Callable[[], int] | None] = SimpleQueue()
        self._ended: SimpleQueue[int | BaseException] = SimpleQueue()
        self._threads = [
            # A daemon: a call of llama.cpp that never returns must not keep the process alive.
            threading.Thread(target=self._run, name="compute helper", daemon=True)
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, works: list[Callable[[], int]]) -> list[int]:
        """Call all ``works`` at the same time, the first on this thread; return what they returned,
        in any order, once all have. Raises what one of them raised."""
        for work in works[1:]:
            self._work.put(work)
        try:
            results = [works[0]()]
        finally:
            ended = [self._ended.get() for _ in works[1:]]
        for result in ended:
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results

    def close(self) -> None:
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                self._ended.put(work())
            except BaseException as error:
                self._ended.put(error)
