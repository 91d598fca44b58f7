"""Says on stderr, if that is a terminal, when a job will end, and why it is silent."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from msgspec import UNSET, UnsetType
from rich.progress import Progress

from cli.client import Client
from cli.exit_status import CommandError
from cli.output import err, estimate_line, progress_line
from shared.wire.api import JobStatus

POLL_S = 1.0
SILENT_POLLS = 4
"""After so many without an event, it is checked whether an inferer still runs the job. One that has
just started a job shows it up to 2 s later."""


class Countdown:
    """A line with the estimate and a bar, which is full at the median of the ETA."""

    def __init__(self, progress: Progress) -> None:
        self.ended = threading.Event()
        self._is_hidden = False
        self._silent_polls = 0
        self._lost_attempt = 0
        """The last attempt that was reported as lost."""
        self._blocked_reason: str | UnsetType = UNSET
        """The last one that was printed, unless the job can start again."""
        self._progress = progress
        self._started = time.monotonic()
        self._task = progress.add_task("submitted", total=None)

    def hide(self) -> None:
        """Remove the line for good."""
        self._is_hidden = True
        self._progress.stop()

    def note_event(self) -> None:
        """There was an event."""
        self._silent_polls = 0

    def say(self, text: str) -> None:
        """Print a line on the terminal."""
        if err.is_terminal:
            err.print(f"\n{text}" if self._is_hidden else text, style="dim")

    def poll(self, client: Client, job_id: str) -> None:
        """Show the estimate, or why the job cannot start, or that it waits because its inferer
        died.

        Raises:
            CommandError: no answer.
        """
        self._silent_polls += 1
        if self._is_hidden and not self._is_silent:
            return
        status = client.status(job_id)
        if status.finished_at is not None:
            return
        if status.blocked_reason != self._blocked_reason:
            self._blocked_reason = status.blocked_reason
            if status.blocked_reason is not UNSET:
                self.say(status.blocked_reason)
        if not self._is_hidden:
            self._show(status)
        if self._is_silent and status.state == "STARTED" and status.attempts > self._lost_attempt:
            inferers = client.inferers().inferers
            is_shown = any(job.id == job_id for entry in inferers for job in entry.jobs)
            # It may have started or ended since it was asked for.
            if not is_shown and self._is_silent:
                self._lost_attempt = status.attempts
                self.say(f"the inferer {status.inferer} is gone; the job waits for another attempt")

    @property
    def _is_silent(self) -> bool:
        return self._silent_polls >= SILENT_POLLS

    def _show(self, status: JobStatus) -> None:
        if status.blocked_reason is not UNSET:
            estimate = "blocked"
        else:
            stage = "waiting" if status.started_at is None else "running"
            estimate = estimate_line(status) or stage
        self._progress.update(self._task, description=estimate)
        if status.eta is not UNSET:
            elapsed_s = time.monotonic() - self._started
            total_s = elapsed_s + max(status.eta.p50_s, 0.0)
            self._progress.update(self._task, completed=elapsed_s, total=total_s)


@contextmanager
def countdown(client: Client, job_id: str) -> Iterator[Countdown]:
    """Show the estimate of ``job_id`` until it is hidden, read every second; and during the whole
    block, why it is silent."""
    with progress_line() as progress:
        line = Countdown(progress)
        polling = threading.Thread(target=_poll, args=(client, job_id, line), daemon=True)
        if err.is_terminal:
            polling.start()
        try:
            yield line
        finally:
            line.ended.set()


def _poll(client: Client, job_id: str, line: Countdown) -> None:
    while True:
        with suppress(CommandError):  # the command reports it
            line.poll(client, job_id)
        if line.ended.wait(POLL_S):
            return
