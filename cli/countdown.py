"""Counts down to the end of a job in a line on stderr, if that is a terminal."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import UNSET
from rich.progress import Progress

from cli.client import Client
from cli.exit_status import CommandError
from cli.output import err, estimate_line, progress_line
from shared.wire.api import JobStatus

POLL_S = 1.0


class Countdown:
    """A line with the estimate and a bar, which is full at the median of the ETA."""

    def __init__(self, progress: Progress) -> None:
        self.hidden = threading.Event()
        self._progress = progress
        self._started = time.monotonic()
        self._task = progress.add_task("submitted", total=None)

    def hide(self) -> None:
        """Remove the line for good."""
        self.hidden.set()
        self._progress.stop()

    def show(self, status: JobStatus) -> None:
        estimate = estimate_line(status) or ("waiting" if status.started_at is None else "running")
        self._progress.update(self._task, description=estimate)
        if status.eta is not UNSET:
            elapsed_s = time.monotonic() - self._started
            total_s = elapsed_s + max(status.eta.p50_s, 0.0)
            self._progress.update(self._task, completed=elapsed_s, total=total_s)


@contextmanager
def countdown(client: Client, job_id: str) -> Iterator[Countdown]:
    """Show the estimate of ``job_id`` during the block, read every second."""
    with progress_line() as progress:
        line = Countdown(progress)
        polling = threading.Thread(target=_poll, args=(client, job_id, line), daemon=True)
        if err.is_terminal:
            polling.start()
        try:
            yield line
        finally:
            line.hidden.set()


def _poll(client: Client, job_id: str, line: Countdown) -> None:
    while True:
        try:
            status = client.status(job_id)
        except CommandError:
            pass  # the command reports it
        else:
            if status.finished_at is None and not line.hidden.is_set():
                line.show(status)
        if line.hidden.wait(POLL_S):
            return
