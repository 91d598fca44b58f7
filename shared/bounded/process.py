"""Child processes that work within limits, and are killed if they exceed them. Their side of the
protocol is in `server.py`."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

START_S = 60.0
"""How long a process may take to start on a busy machine."""
POLL_S = 0.05
BUSY_S = 0.05
"""How long a request waits for one of the processes of a pool before another one is started. Most
requests take a millisecond; a start takes a fifth of a second, just when many requests come."""
MAX_RESPONSE_BYTES = 64 * 2**20


class Cancelled(Exception):
    """The response is no longer needed."""


class LimitExceeded(Exception):
    """There was no response within the limits; the message names the limit."""


class KilledExternally(OSError):
    """The process was killed by the kernel, to free memory, or by a user: the request that it was
    working on may be harmless."""


class BoundedProcess:
    """``python -m MODULE``, which responds to each line of JSON with one. It exits when its stdin
    is closed, and so also when its parent is gone."""

    @classmethod
    def start(cls, module: str, setup: Any) -> Self:
        """Start a process and wait until it has responded to the request ``setup`` with null.

        Raises:
            ValueError: it responded with an error, or exceeded a limit.
            OSError: it could not be started.
        """
        process = cls(module)
        try:
            error = process.request(json.dumps(setup), START_S, threading.Event())
            if error is not None:
                raise ValueError(error)
        except LimitExceeded as error:
            process.kill()
            raise ValueError(f"it takes {error}") from error
        except BaseException:
            process.kill()
            raise
        return process

    def __init__(self, module: str) -> None:
        """Raises: OSError: it could not be started."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What native code prints when it runs out of memory is not for the log.
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends this process
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def request(self, body: str, timeout_s: float, cancelled: threading.Event) -> Any:
        """The decoded response to ``body``, one line of JSON.

        Raises:
            LimitExceeded: no response within the limits. The process cannot be used again.
            Cancelled: ``cancelled`` was set. The process cannot be used again.
            KilledExternally.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        unsent = memoryview(body.encode() + b"\n")
        received = bytearray()
        stdout, stdin = self._process.stdout.fileno(), self._process.stdin.fileno()
        os.set_blocking(stdin, False)
        while not received.endswith(b"\n"):
            if cancelled.is_set():
                raise Cancelled
            if time.monotonic() > deadline:
                raise LimitExceeded(f"more than {timeout_s:.0f} s")
            if len(received) > MAX_RESPONSE_BYTES:
                raise LimitExceeded(f"more than {MAX_RESPONSE_BYTES // 2**20} MiB of text")
            readable, writable, _ = select.select([stdout], [stdin] if unsent else [], [], POLL_S)
            try:
                if writable:
                    unsent = unsent[os.write(stdin, unsent) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                raise self._exit_error() from None
            if readable:
                data = os.read(stdout, 2**16)
                if not data:
                    raise self._exit_error()
                received += data
        return json.loads(received)

    def _exit_error(self) -> Exception:
        """Why it exited during a request. Its own limits end it by other signals than SIGKILL, and
        `kill` is not called meanwhile."""
        if self._process.wait() == -signal.SIGKILL:
            return KilledExternally(
                "it was killed from outside; did the machine run out of memory?"
            )
        return LimitExceeded("too much time or memory")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class BoundedProcesses:
    """A pool of processes of one kind: each works for one thread at a time, idle ones are kept.
    Another one is started when all of them are busy with long requests."""

    def __init__(self, start: Callable[[], BoundedProcess]) -> None:
        """``start`` returns another process that is ready; `request` raises what it raises."""
        self._start = start
        self._all: set[BoundedProcess] = set()
        self._idle = queue.LifoQueue[BoundedProcess]()

    def start_one(self) -> None:
        self._idle.put(self._started())

    def request(self, body: str, timeout_s: float, cancelled: threading.Event) -> Any:
        """As `BoundedProcess.request`, by any process; one that does not respond is killed. If it
        was killed from outside, another one gets the request, once."""
        try:
            return self._request(body, timeout_s, cancelled)
        except KilledExternally:
            return self._request(body, timeout_s, cancelled)

    def close(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._kill(self._idle.get_nowait())

    def _request(self, body: str, timeout_s: float, cancelled: threading.Event) -> Any:
        process = self._take()
        try:
            response = process.request(body, timeout_s, cancelled)
        except BaseException:
            self._kill(process)
            raise
        self._idle.put(process)
        return response

    def _take(self) -> BoundedProcess:
        while True:
            try:
                process = self._idle.get(timeout=BUSY_S if self._all else 0)
            except queue.Empty:
                return self._started()
            if process.is_alive:
                return process
            self._kill(process)  # it was killed while idle, so no request is to blame

    def _started(self) -> BoundedProcess:
        process = self._start()
        self._all.add(process)
        return process

    def _kill(self, process: BoundedProcess) -> None:
        self._all.remove(process)
        process.kill()
