"""Writes log lines from a thread of its own, so that a log that blocks or fails stops no work."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

MOST_HELD_BYTES = 4 * 1024**2
"""Some 20,000 lines: what a reader that pauses for a while still gets."""

BATCH_S = 0.002
"""A line is written at once; those that follow within this time are written together. The thread
needs the interpreter's lock for each write, which would slow down a burst."""

WRITE_BYTES = select.PIPE_BUF
"""Up to so many, lines of several processes on one pipe do not run into each other."""


class LogWriter:
    """Takes whole lines and writes them in order to a file descriptor.

    Lines that fail, or that come faster than they can be written, are dropped, the oldest first.
    In their place stands one line that says how many, as soon as it can be written.
    """

    def __init__(
        self,
        descriptor: int,
        dropped_line: Callable[[int], str],
        most_held_bytes: int = MOST_HELD_BYTES,
    ) -> None:
        """``dropped_line`` renders the line for so many dropped ones."""
        self._descriptor = descriptor
        self._dropped_line = dropped_line
        self._most_held_bytes = most_held_bytes
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._lines: deque[bytes] = deque()
        self._held_bytes = 0
        self._dropped = 0
        self._is_awake = False
        # The thread's own:
        self._is_mid_line = False  # a write failed after a part of a line
        self._wake = threading.Semaphore(0)
        # A daemon: a write that blocks for ever must not keep the process from ending.
        threading.Thread(target=self._run, name="log writer", daemon=True).start()

    def write(self, text: str) -> None:
        """Queue ``text``, one or more whole lines; returns at once, raises nothing."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            self._lines.append(data)
            self._held_bytes += len(data)
            while self._held_bytes > self._most_held_bytes and len(self._lines) > 1:
                self._held_bytes -= len(self._lines.popleft())
                self._dropped += 1
            was_awake, self._is_awake = self._is_awake, True
        if not was_awake:
            self._wake.release()

    def flush(self) -> None:
        """Nothing: streams have it. See `drain`."""

    def drain(self, patience_s: float) -> None:
        """Wait until everything is written, at most ``patience_s``."""
        give_up_at = time.monotonic() + patience_s
        while self._is_awake and time.monotonic() < give_up_at:
            time.sleep(BATCH_S)

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            while self._write_pending():
                time.sleep(BATCH_S)

    def _write_pending(self) -> bool:
        """Write until no line is left; False if there was none, and it is time to sleep."""
        with self._lock:
            self._is_awake = bool(self._lines)
        while batch := self._next_batch():
            dropped, lines = batch
            if dropped and self._write(f"{self._dropped_line(dropped)}\n".encode()):
                lost = dropped + len(lines)
            else:
                lost = self._write(b"".join(lines))
            with self._lock:
                self._dropped += lost
        return self._is_awake

    def _next_batch(self) -> tuple[int, list[bytes]] | None:
        """How many lines were dropped, and those that come next, for one write."""
        lines: list[bytes] = []
        size = 0
        with self._lock:
            while self._lines and (not size or size + len(self._lines[0]) <= WRITE_BYTES):
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            self._held_bytes -= size
            if not lines:
                return None
            dropped, self._dropped = self._dropped, 0
        return dropped, lines

    def _write(self, lines: bytes) -> int:
        """Write them; how many could not be written."""
        # What was cut off by a write that failed must not run into the next line.
        rest = memoryview(b"\n" + lines if self._is_mid_line else lines)
        written = 0
        while rest:
            try:
                written = os.write(self._descriptor, rest)
            except BlockingIOError:  # another process has made the shared file non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
                continue
            except OSError:
                break
            self._is_mid_line = rest[written - 1] != ord("\n")
            rest = rest[written:]
        return bytes(rest).count(b"\n")
