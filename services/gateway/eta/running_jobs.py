"""Which jobs run where: heard as they start and end, and seen in the inferers' entries."""

import time
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime

from msgspec import Struct

from shared.timestamps import milliseconds_between, timestamp
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry
from shared.wire.requests import Work

REMEMBERED = 1000
UNSEEN_S = 5.0
"""Entries are renewed every second: what runs for longer is in one, or does not run any more."""


class Run(Struct, frozen=True):
    """One attempt under way; ``tokens`` is what its inferer last spoke of."""

    job_id: str
    inferer: str
    started_at: str
    work: Work | None
    tokens: int = 0

    def elapsed_s(self, now: datetime) -> float:
        """How long it has run; ``now`` is the broker's time, as that of its start is."""
        return milliseconds_between(self.started_at, timestamp(now)) / 1000


class RunningJobs:
    """An entry is up to a second old, and a job may be shorter: so events count first."""

    def __init__(self) -> None:
        self._heard: OrderedDict[str, Run] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._heard_at = time.monotonic()

    @property
    def quiet_s(self) -> float:
        """For how long no job has started or ended."""
        return time.monotonic() - self._heard_at

    def hear(self, job_id: str, event: StateEvent) -> None:
        """A job has started, or does not run any more."""
        self._heard_at = time.monotonic()
        if event.state == "started" and event.code is None:
            self._ended.pop(job_id, None)
            self._heard[job_id] = Run(job_id, event.inferer, event.at, event.work)
            _bound(self._heard)
        else:
            self.end(job_id)

    def end(self, job_id: str) -> None:
        self._heard_at = time.monotonic()
        self._heard.pop(job_id, None)
        self._ended[job_id] = None
        _bound(self._ended)

    def of(self, entries: Iterable[InfererEntry], now: datetime) -> dict[str, Run]:
        """The jobs that run on these inferers, by id; ``now`` is the broker's time."""
        running: dict[str, Run] = {}
        for entry in entries:
            for job in entry.jobs:
                if job.id not in self._ended:
                    running[job.id] = Run(
                        job.id, entry.id, job.started_at, job.work, job.completion_tokens
                    )
            for run in self._heard.values():
                if run.inferer == entry.id:
                    seen = running.get(run.job_id)
                    # Its end may have been missed; and an entry may speak of an earlier attempt.
                    if (seen is None and run.elapsed_s(now) < UNSEEN_S) or (
                        seen is not None and seen.started_at < run.started_at
                    ):
                        running[run.job_id] = run
        return running


def _bound(remembered: OrderedDict[str, Run] | OrderedDict[str, None]) -> None:
    while len(remembered) > REMEMBERED:
        remembered.popitem(last=False)
