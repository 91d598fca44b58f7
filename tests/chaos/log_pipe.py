"""A log that is no longer read: the pipe between a process and the collector of its log."""

import fcntl
import os
import select
import threading
from contextlib import suppress
from pathlib import Path

SIZE_BYTES = 4_096
"""The smallest there is: some lines, and it is full."""

POLL_S = 0.05


class LogPipe:
    """Everything that is written to ``end`` arrives in ``log``, unless it is blocked."""

    def __init__(self, log: Path) -> None:
        self._reading, self.end = os.pipe()
        fcntl.fcntl(self.end, fcntl.F_SETPIPE_SZ, SIZE_BYTES)
        self._log = log
        self._flows = threading.Event()
        self._flows.set()
        self._thread = threading.Thread(target=self._pump, name="log-pipe", daemon=True)
        self._thread.start()

    def close_end(self) -> None:
        """Once a process has it: the pipe then ends with that process."""
        os.close(self.end)

    def block(self) -> None:
        """From now on nobody reads, and it is full."""
        self._flows.clear()
        # Opened anew, as a flag that is set on the end itself would be the process's too.
        filling = os.open(f"/proc/self/fd/{self._reading}", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(filling, b"\n")
        os.close(filling)

    def unblock(self) -> None:
        self._flows.set()

    def _pump(self) -> None:
        with self._log.open("ab", buffering=0) as log:
            while self._flows.wait():
                # It must not sit in a read when it is blocked: that would take what comes next.
                if not select.select([self._reading], [], [], POLL_S)[0]:
                    continue
                data = os.read(self._reading, SIZE_BYTES)
                if not data:
                    break
                log.write(data)
        os.close(self._reading)
