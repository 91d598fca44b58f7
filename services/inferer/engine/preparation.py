"""Threads that prepare requests beside the compute thread: a long prompt or a large schema does not
delay other jobs."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from queue import SimpleQueue

STACK_BYTES = 512 * 2**20
"""llama.cpp splits a text into words by recursion, some hundred bytes per character. Only the used
part takes memory. Measured: docs/decisions/0019."""

MAX_WORK_S = 0.25
"""After longer work a thread may have used much of its stack: another one replaces it."""

_stack_size_lock = threading.Lock()
"""The size is a setting of the whole process."""


class Preparation:
    """A thread for each slot. Native code cannot be interrupted: where the work was cancelled, only
    its own thread waits for its end."""

    def __init__(self, threads: int) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._threads = 0
        self._begun = count(1)
        """Numbers for the pieces of work, each used once."""
        self._in_progress: dict[object, int] = {}
        """The piece of work of each busy thread, by the thread's number. Written by that thread,
        read by any."""
        self.grow(threads)

    @property
    def in_progress(self) -> dict[object, int]:
        """For each busy thread a counter that changes when it begins other work."""
        return dict(self._in_progress)

    def grow(self, threads: int) -> None:
        """Have at least ``threads`` threads.

        Raises:
            RuntimeError: not enough memory for another thread.
        """
        while self._threads < threads:
            self._start(self._threads)
            self._threads += 1

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work``, which does not raise, on one of the threads; from any thread."""
        self._work.put(work)

    def _run(self, number: int) -> None:
        while True:
            work = self._work.get()
            started = time.monotonic()
            self._in_progress[number] = next(self._begun)
            work()
            del self._in_progress[number]
            if time.monotonic() - started > MAX_WORK_S:
                with suppress(RuntimeError):  # not enough memory: this one continues
                    self._start(number)
                    return

    def _start(self, number: int) -> None:
        # A daemon: a call that never returns must not keep the process alive.
        thread = threading.Thread(target=self._run, args=(number,), name="prepare", daemon=True)
        with _stack_size_lock:
            before = threading.stack_size(STACK_BYTES)
            try:
                thread.start()
            finally:
                threading.stack_size(before)
