"""What a child process writes to stdout and stderr: passed on line by line, its last words kept."""

import asyncio
import os
import re
from types import TracebackType
from typing import Self

from shared.logs import write_raw_lines

READ_BYTES = 65_536
LONGEST_LINE_BYTES = 1024**2

BROKER_EVENT = re.compile(r"\[\d+\] \S+ \S+ \[(?P<level>[A-Z]{3})\] (?P<text>.*)")
"""A line of nats-server: process, date, time, level, text."""


class ChildOutput:
    """A pipe for one process, read while the block runs.

    The child is never held up by whoever reads our own stderr, and lines stay whole.
    """

    def __init__(self) -> None:
        self.last_words = ""
        """What it said last that was not a log event, or an error in the broker's log: there it
        stands why it cannot start."""
        self._reader, self.descriptor = os.pipe()
        """The end that the child writes to."""
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
        while self._read():  # what it wrote before it ended
            pass
        if self._rest:
            self._pass_on(self._rest + b"\n")
        asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)

    def _read(self) -> bool:
        """Pass on what is there; False when there is nothing, now or for good."""
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
        write_raw_lines(text)
        for line in text.splitlines():
            event = BROKER_EVENT.match(line)
            if event is not None:
                line = event["text"] if event["level"] in ("FTL", "ERR") else ""
            if line.strip() and not line.startswith("{"):
                self.last_words = line.strip()
