"""A command as somebody at a terminal sees it."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.processes import PATIENCE_S, clean_environment, eventually, scripts

HOME = "\x1b[H"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a pseudo-terminal of its own, and what is to be seen there."""

    def __init__(self, *command: str) -> None:
        ours, theirs = pty.openpty()
        os.set_blocking(ours, False)
        self._ours: int | None = ours
        termios.tcsetwinsize(theirs, (30, 80))

        def take_over() -> None:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # this shell may ignore it

        # A size in the environment is not that of this terminal.
        environment = {
            name: value
            for name, value in clean_environment().items()
            if name not in ("COLUMNS", "LINES")
        }
        self.process = subprocess.Popen(
            [scripts() / "sluice", *command],
            env={**environment, "TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_over,
        )
        os.close(theirs)
        self._bytes = b""

    def type(self, keys: bytes) -> None:
        assert self._ours is not None
        os.write(self._ours, keys)

    @property
    def output(self) -> str:
        """All that was written so far."""
        try:
            while self._ours is not None:
                self._bytes += os.read(self._ours, 65536)
        except OSError:  # nothing more now, or for ever
            pass
        return self._bytes.decode(errors="replace")

    @property
    def screen(self) -> str:
        """The last frame that is complete."""
        frames = self.output.split(HOME)
        return ESCAPE.sub("", frames[-2]) if len(frames) > 1 else ""

    def shows(self, text: str) -> None:
        """Wait until it does."""
        eventually(lambda: text in self.screen, f"{text!r} in\n{self.output[-4000:]}")

    def hides(self, text: str) -> None:
        eventually(lambda: text not in self.screen, f"{text!r} is gone from\n{self.screen}")

    def close(self) -> None:
        if self._ours is not None:
            os.close(self._ours)
        self._ours = None


@contextmanager
def terminal(*command: str) -> Iterator[Terminal]:
    running = Terminal(*command)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(PATIENCE_S)
        running.close()
