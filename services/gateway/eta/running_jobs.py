"""Which jobs run on which inferer, from state events and from the inferers' heartbeats."""

import time
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime

from msgspec import Struct

from shared.timestamps import milliseconds_between, timestamp
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry
from shared.wire.requests import Work

MAX_REMEMBERED = 1000
UNCONFIRMED_S = 5.0
"""Heartbeats come every second. A job that started longer ago than this and is in none of them
does not run any more."""


class RunningAttempt(Struct, frozen=True):
    """One attempt that runs now; ``tokens`` is the number its inferer last reported."""

    job_id: str
    inferer: str
    started_at: str
    work: Work | None
    tokens: int = 0

    def elapsed_s(self, now: datetime) -> float:
        """Seconds since the start; ``now`` is the broker's time, like ``started_at``."""
        return milliseconds_between(self.started_at, timestamp(now)) / 1000


class RunningJobs:
    """A heartbeat is up to a second old, longer than some jobs run. So events take precedence."""

    def __init__(self) -> None:
        self._started: OrderedDict[str, RunningAttempt] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._last_event_at = time.monotonic()

    @property
    def quiet_s(self) -> float:
        """Seconds since a job last started or ended."""
        return time.monotonic() - self._last_event_at

    def on_state_event(self, job_id: str, event: StateEvent) -> None:
        """A job has started, or has stopped running."""
        self._last_event_at = time.monotonic()
        if event.state == "started" and event.code is None:
            self._ended.pop(job_id, None)
            self._started[job_id] = RunningAttempt(job_id, event.inferer, event.at, event.work)
            _discard_oldest(self._started)
        else:
            self.end(job_id)

    def knows_of(self, job_id: str) -> bool:
        return job_id in self._started or job_id in self._ended

    def end(self, job_id: str) -> None:
        self._last_event_at = time.monotonic()
        self._started.pop(job_id, None)
        self._ended[job_id] = None
        _discard_oldest(self._ended)

    def running_on(
        self, entries: Iterable[InfererEntry], now: datetime
    ) -> dict[str, RunningAttempt]:
        """The attempts that run on these inferers, by job id; ``now`` is the broker's time."""
        running: dict[str, RunningAttempt] = {}
        for entry in entries:
            for job in entry.jobs:
                if job.id not in self._ended:
                    running[job.id] = RunningAttempt(
                        job.id, entry.id, job.started_at, job.work, job.completion_tokens
                    )
            for attempt in self._started.values():
                if attempt.inferer == entry.id:
                    reported = running.get(attempt.job_id)
                    # The end of an unreported attempt may have been missed; and a heartbeat may
                    # still report an earlier attempt of the same job.
                    if (reported is None and attempt.elapsed_s(now) < UNCONFIRMED_S) or (
                        reported is not None and reported.started_at < attempt.started_at
                    ):
                        running[attempt.job_id] = attempt
        return running


def _discard_oldest(
    remembered: OrderedDict[str, RunningAttempt] | OrderedDict[str, None],
) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.popitem(last=False)
