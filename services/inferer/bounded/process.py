"""Processes that work for an inferer within bounds: asked on their stdin, killed if they take too
much. Their own side of it is `bounded_worker.py`."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

START_S = 60.0
"""How long a process may take to start on a machine that is busy."""
POLL_S = 0.05
LONGEST_ANSWER_BYTES = 64 * 2**20


class Cancelled(Exception):
    """Nobody needs the answer any more."""


class TookTooMuch(Exception):
    """There was no answer within the bounds; the message says of what it took more."""


class KilledFromOutside(OSError):
    """The kernel has killed the process to make room, or somebody by hand: the question it was
    asked may be harmless."""


class BoundedProcess:
    """``python -m MODULE``, which answers each line of JSON with one. It ends when its stdin is
    closed, so also when the inferer is gone."""

    @classmethod
    def started(cls, module: str, greeting: Any) -> Self:
        """One that has answered ``greeting`` with null: it is ready.

        Raises:
            ValueError: it has said why it cannot work, or takes too much to start.
            OSError: it could not be started.
        """
        process = cls(module)
        try:
            why = process.ask(json.dumps(greeting), START_S, threading.Event())
            if why is not None:
                raise ValueError(why)
        except TookTooMuch as error:
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
            # What native code says when its memory ends is not for the log.
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us, and we end it
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: str, within_s: float, cancelled: threading.Event) -> Any:
        """The answer to ``question``, JSON on one line.

        Raises:
            TookTooMuch: no answer within the bounds; the process cannot be used again.
            Cancelled: ``cancelled`` was set meanwhile; nor can it then.
            KilledFromOutside: as its name says.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        give_up_at = time.monotonic() + within_s
        unsent = memoryview(question.encode() + b"\n")
        received = bytearray()
        out, into = self._process.stdout.fileno(), self._process.stdin.fileno()
        os.set_blocking(into, False)
        while not received.endswith(b"\n"):
            if cancelled.is_set():
                raise Cancelled
            if time.monotonic() > give_up_at:
                raise TookTooMuch(f"more than {within_s:.0f} s")
            if len(received) > LONGEST_ANSWER_BYTES:
                raise TookTooMuch(f"more than {LONGEST_ANSWER_BYTES // 2**20} MiB of text")
            readable, writable, _ = select.select([out], [into] if unsent else [], [], POLL_S)
            try:
                if writable:
                    unsent = unsent[os.write(into, unsent) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                raise self._death() from None
            if readable:
                more = os.read(out, 2**16)
                if not more:
                    raise self._death()
                received += more
        return json.loads(received)

    def _death(self) -> Exception:
        """What its end means: its own bounds end it by other signals, and `kill` is not called
        while it is asked."""
        if self._process.wait() == -signal.SIGKILL:
            return KilledFromOutside(
                "it was killed from outside; did the machine run out of memory?"
            )
        return TookTooMuch("too much time or memory")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class BoundedProcesses:
    """Any number of one kind, each asked by one thread at a time. Those that are idle are kept."""

    def __init__(self, start: Callable[[], BoundedProcess]) -> None:
        """``start`` gives another one, which is ready; what it raises, `ask` raises."""
        self._start = start
        self._idle: list[BoundedProcess] = []

    def keep_one_ready(self) -> None:
        self._idle.append(self._start())

    def ask(self, question: str, within_s: float, cancelled: threading.Event) -> Any:
        """The answer of one of them, as `BoundedProcess.ask`; one that gave none is killed. If it
        was killed from outside, another one is asked, once."""
        try:
            return self._ask_one(question, within_s, cancelled)
        except KilledFromOutside:
            return self._ask_one(question, within_s, cancelled)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    def _ask_one(self, question: str, within_s: float, cancelled: threading.Event) -> Any:
        process = self._take()
        try:
            answer = process.ask(question, within_s, cancelled)
        except BaseException:
            process.kill()
            raise
        self._idle.append(process)
        return answer

    def _take(self) -> BoundedProcess:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:  # also where another thread was faster
                return self._start()
            if process.is_alive:
                return process
            process.kill()  # somebody else did, to make room perhaps: this question did not
