"""Passes on the output of a child process line by line, and remembers its last message."""

import asyncio
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cli.up.log_format import BROKER_LINE
from shared.logs import write_raw_lines

READ_BYTES = 65_536
LONGEST_LINE_BYTES = 1024**2


class ChildOutput:
    """A pipe for the output of one process, read while the block runs.

    A slow reader of this process's stderr does not block the child, and lines stay whole.
    """

    def __init__(self, render: Callable[[str], str | None] | None = None) -> None:
        """``render`` turns a line into the one to write, or None to omit it; by default lines are
        written unchanged."""
        self._render = render
        self.last_output = ""
        """The last line that is not a log event, or the last error in the broker's log. It usually
        says why a process could not start."""
        self._reader, self.descriptor = os.pipe()
        """The end of the pipe for the child."""
        os.set_blocking(self._reader, False)
        self._rest = b""

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._reader, self._read)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.descriptor)
        while self._read():  # the rest of its output
            pass
        if self._rest:
            self._pass_on(self._rest + b"\n")
        asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)

    def _read(self) -> bool:
        """Pass on what can be read now. Returns False if there is nothing."""
        try:
            data = os.read(self._reader, READ_BYTES)
        except BlockingIOError:
            return False
        lines, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if newline:
            self._pass_on(lines + newline)
        if len(self._rest) > LONGEST_LINE_BYTES:
            self._pass_on(self._rest + b"\n")
            self._rest = b""
        return bool(data)

    def _pass_on(self, lines: bytes) -> None:
        text = lines.decode(errors="backslashreplace")
        if self._render is None:
            write_raw_lines(text)
        for line in text.splitlines():
            if self._render is not None and (rendered := self._render(line)) is not None:
                write_raw_lines(f"{rendered}\n")
            event = BROKER_LINE.match(line)
            if event is not None:
                line = event["text"] if event["level"] in ("FTL", "ERR") else ""
            if line.strip() and not line.startswith("{"):
                self.last_output = line.strip()
