"""A part of a prompt that is computed while other sequences go on (decision 59)."""

import ctypes
import threading
import time
from collections.abc import Callable

from services.inferer.engine.context import (
    ABORTED,
    DECODED,
    NOT_SET,
    SET,
    EngineMemory,
    decode_error,
)
from services.inferer.engine.generation import GenerationSequence
from services.inferer.engine.scheduler import Chunk


class BackgroundPrompt:
    """Computes one chunk at a time. The compute thread owns it, except where noted."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        """``on_end`` is called, on another thread, each time a chunk has ended."""
        self.chunk: Chunk[GenerationSequence] | None = None
        """The one that is computed, or has been and was not taken yet. May be read by any
        thread."""
        self.chunks = 0
        """How many have begun. May be read by any thread."""
        self.seconds = 0.0
        """How long the last one took."""
        self._on_end = on_end
        self._abort_flag = ctypes.create_string_buffer(2)
        self._outcome: int | Exception | None = None
        self._thread = threading.Thread()

    @property
    def sequence(self) -> GenerationSequence | None:
        """That of the chunk. May be read by any thread."""
        chunk = self.chunk
        return chunk.sequence if chunk else None

    @property
    def has_ended(self) -> bool:
        """Whether `take` has something to return at once."""
        return self._outcome is not None

    def begin(self, chunk: Chunk[GenerationSequence], memory: EngineMemory) -> None:
        """Compute ``chunk``. Until `take` is called, ``memory`` and the slot of the chunk must stay
        as they are. If it raises, nothing is computed, but ``memory`` may have begun."""
        self._abort_flag[0] = NOT_SET
        compute = memory.begin_background(chunk, self._abort_flag)
        # A daemon: a call of llama.cpp that never returns must not keep the process alive.
        self._thread = threading.Thread(
            target=self._run, args=(compute,), name="background prompt", daemon=True
        )
        self._thread.start()
        self.chunk = chunk
        self.chunks += 1

    def abort(self) -> None:
        """Have the chunk end soon."""
        self._abort_flag[0] = SET

    def take(self) -> tuple[Chunk[GenerationSequence], int | Exception]:
        """The chunk, once it has ended, and `DECODED`, `ABORTED` or an error."""
        self._thread.join()
        chunk, outcome = self.chunk, self._outcome
        assert chunk is not None
        assert outcome is not None
        self.chunk = self._outcome = None
        return chunk, outcome

    def _run(self, compute: Callable[[], int]) -> None:
        started = time.perf_counter()
        outcome: int | Exception
        try:
            status = compute()
            # Now: a batch that begins later forgets the reason.
            outcome = status if status in (DECODED, ABORTED) else decode_error(status)
        except Exception as error:
            outcome = error
        self.seconds = time.perf_counter() - started
        self._outcome = outcome
        self._on_end()
