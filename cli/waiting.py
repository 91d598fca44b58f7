"""A line on a terminal's stderr that counts down to a job's end; nothing where nobody looks."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import UNSET
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from cli.client import Client
from cli.exit_status import CommandError
from cli.output import err, outlook_line
from shared.wire.api import JobStatus

LOOK_EVERY_S = 1.0


class Waiting:
    """The bar is full when the job is as likely to be done as not."""

    def __init__(self, progress: Progress, job_id: str) -> None:
        self.hidden = threading.Event()
        self._progress = progress
        self._started = time.monotonic()
        self._task = progress.add_task(job_id, total=None)

    def hide(self) -> None:
        """Make room for the answer."""
        self.hidden.set()
        self._progress.stop()

    def show(self, status: JobStatus) -> None:
        outlook = outlook_line(status) or ("waits" if status.started_at is None else "runs")
        self._progress.update(self._task, description=f"{status.id}: {outlook}")
        if status.eta is not UNSET:
            elapsed_s = time.monotonic() - self._started
            total_s = elapsed_s + max(status.eta.p50_s, 0.0)
            self._progress.update(self._task, completed=elapsed_s, total=total_s)


@contextmanager
def waiting(client: Client, job_id: str) -> Iterator[Waiting]:
    """Show the outlook of ``job_id`` during the block, looked up every second."""
    progress = Progress(
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        # It would take stdout for a part of its own display, and write the answer to stderr.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with progress:
        shown = Waiting(progress, job_id)
        looking = threading.Thread(target=_look, args=(client, job_id, shown), daemon=True)
        if err.is_terminal:
            looking.start()
        try:
            yield shown
        finally:
            shown.hidden.set()


def _look(client: Client, job_id: str, shown: Waiting) -> None:
    while True:
        try:
            status = client.status(job_id)
        except CommandError:
            pass  # who follows the job says what is wrong
        else:
            if status.finished_at is None and not shown.hidden.is_set():
                shown.show(status)
        if shown.hidden.wait(LOOK_EVERY_S):
            return
