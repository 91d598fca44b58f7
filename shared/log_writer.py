"""Writes log lines from a separate thread, so that a blocked or failing log stops no work."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_BUFFERED_BYTES = 4 * 1024**2
"""Some 20,000 lines, for a reader that pauses."""

BATCH_S = 0.002
"""A line is written at once; lines that follow within this time are written together. Each write
takes the interpreter's lock, so single writes would slow down a burst."""

WRITE_BYTES = select.PIPE_BUF
"""Writes of up to this size are atomic on a pipe that several processes share."""


class LogWriter:
    """Takes whole lines and writes them in order to a file descriptor.

    Lines that cannot be written, or not fast enough, are dropped, the oldest first. One line with
    their number is written in their place as soon as possible.
    """

    def __init__(
        self,
        descriptor: int,
        dropped_line: Callable[[int], str],
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    ) -> None:
        """``dropped_line`` renders the line for a number of dropped lines."""
        self._descriptor = descriptor
        self._dropped_line = dropped_line
        self._max_buffered_bytes = max_buffered_bytes
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._lines: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._dropped = 0
        self._is_awake = False
        # The thread's own:
        self._is_mid_line = False  # a write failed after a part of a line
        self._wake = threading.Semaphore(0)
        # A daemon, so that a blocked write does not keep the process from ending.
        threading.Thread(target=self._run, name="log writer", daemon=True).start()

    def write(self, text: str) -> None:
        """Queue ``text``, one or more complete lines. Never blocks, never raises."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            self._lines.append(data)
            self._buffered_bytes += len(data)
            while self._buffered_bytes > self._max_buffered_bytes and len(self._lines) > 1:
                self._buffered_bytes -= len(self._lines.popleft())
                self._dropped += 1
            was_awake, self._is_awake = self._is_awake, True
        if not was_awake:
            self._wake.release()

    def flush(self) -> None:
        """Does nothing; it completes the stream interface. See `drain`."""

    def drain(self, timeout_s: float) -> None:
        """Wait until everything is written, ``timeout_s`` at most."""
        give_up_at = time.monotonic() + timeout_s
        while self._is_awake and time.monotonic() < give_up_at:
            time.sleep(BATCH_S)

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            while self._write_pending():
                time.sleep(BATCH_S)

    def _write_pending(self) -> bool:
        """Write until no line is left. Returns False if there was none to write."""
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
        """The number of dropped lines, and the next lines that fit into one write."""
        lines: list[bytes] = []
        size = 0
        with self._lock:
            while self._lines and (not size or size + len(self._lines[0]) <= WRITE_BYTES):
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            self._buffered_bytes -= size
            if not lines:
                return None
            dropped, self._dropped = self._dropped, 0
        return dropped, lines

    def _write(self, lines: bytes) -> int:
        """Write ``lines``. Returns how many could not be written."""
        # A partial line of a failed write must not run into the next line.
        rest = memoryview(b"\n" + lines if self._is_mid_line else lines)
        written = 0
        while rest:
            try:
                written = os.write(self._descriptor, rest)
            except BlockingIOError:  # another process made the shared file non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
                continue
            except OSError:
                break
            self._is_mid_line = rest[written - 1] != ord("\n")
            rest = rest[written:]
        return bytes(rest).count(b"\n")
