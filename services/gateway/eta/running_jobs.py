"""Which jobs run on which inferer, from state events and from the inferers' heartbeats."""

import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime

from msgspec import Struct

from shared.broker.inferers import Live
from shared.timestamps import milliseconds_between, timestamp
from shared.wire.events import StateEvent
from shared.wire.requests import Work

MAX_REMEMBERED = 1000
UNCONFIRMED_S = 5.0
"""Heartbeats come every second. A job that started longer ago than this and is in none of them
does not run any more."""


Order = tuple[float, str]
"""The number of an attempt and a time, as the one after a requeued attempt has the same number."""
NO_ATTEMPT: Order = (0, "")
EVERY_ATTEMPT: Order = (math.inf, "")


class RunningAttempt(Struct, frozen=True):
    """One attempt that runs now, the job's first, second and so on by its ``number``; ``tokens`` is
    how many its inferer had computed at its last heartbeat, and ``prompt_tokens_left`` how many of
    the prompt it had not."""

    job_id: str
    number: int
    inferer: str
    started_at: str
    work: Work | None
    tokens: int = 0
    heartbeat_at: str | None = None
    prompt_tokens_left: int | None = None

    @property
    def order(self) -> Order:
        return self.number, self.started_at

    def elapsed_s(self, now: datetime) -> float:
        """Seconds since the start; ``now`` is the broker's time, like ``started_at``."""
        return milliseconds_between(self.started_at, timestamp(now)) / 1000

    def since_heartbeat_s(self, now: datetime) -> float:
        """Seconds since the last heartbeat; since the start before the first."""
        since = self.heartbeat_at or self.started_at
        return milliseconds_between(since, timestamp(now)) / 1000


class RunningJobs:
    """The attempts that run now. Events take precedence over heartbeats, which may be older than
    some jobs run: up to a second."""

    def __init__(self) -> None:
        self._started: OrderedDict[str, RunningAttempt] = OrderedDict()
        self._ended: OrderedDict[str, Order] = OrderedDict()
        """By job id: what was started up to here has ended; a later start may have been missed."""
        self._last_event_at = time.monotonic()

    @property
    def quiet_s(self) -> float:
        """Seconds since a job last started or ended."""
        return time.monotonic() - self._last_event_at

    def on_state_event(self, job_id: str, event: StateEvent) -> None:
        """An attempt has started, or has stopped running."""
        if event.state == "started" and event.code is None:
            self._last_event_at = time.monotonic()
            self._ended.pop(job_id, None)
            self._started[job_id] = RunningAttempt(
                job_id, event.attempt, event.inferer, event.at, event.work
            )
            _discard_oldest(self._started)
        else:
            self._end(job_id, (event.attempt, event.at))

    def on_result(self, job_id: str) -> None:
        """The job has ended, whatever attempt was its last."""
        self._end(job_id, EVERY_ATTEMPT)

    def has_just_started(self, job_id: str, now: datetime) -> bool:
        """Whether an attempt runs that may not be in a heartbeat yet."""
        attempt = self._started.get(job_id)
        return attempt is not None and attempt.elapsed_s(now) < UNCONFIRMED_S

    def knows_of(self, job_id: str) -> bool:
        return job_id in self._started or job_id in self._ended

    def _end(self, job_id: str, last: Order) -> None:
        """``last`` need not be the last attempt: the inferer that lost it may say so while the
        next one runs."""
        self._last_event_at = time.monotonic()
        if job_id in self._started and self._started[job_id].order <= last:
            del self._started[job_id]
        self._ended[job_id] = max(last, self._ended.get(job_id, NO_ATTEMPT))
        _discard_oldest(self._ended)

    def running_on(self, inferers: Iterable[Live], now: datetime) -> dict[str, RunningAttempt]:
        """The attempts that run on these inferers, by job id; ``now`` is the broker's time."""
        running: dict[str, RunningAttempt] = {}
        for entry, heartbeat_at in ((one.entry, one.heartbeat_at) for one in inferers):
            for job in entry.jobs:
                reported = RunningAttempt(
                    job.id,
                    job.attempt,
                    entry.id,
                    job.started_at,
                    job.work,
                    job.completion_tokens,
                    heartbeat_at,
                    job.prompt_tokens_left,
                )
                if reported.order > self._ended.get(job.id, NO_ATTEMPT):
                    running[job.id] = reported
            for attempt in self._started.values():
                if attempt.inferer == entry.id:
                    known = running.get(attempt.job_id)
                    # The end of an unreported attempt may have been missed; and a heartbeat may
                    # still report an earlier attempt of the same job.
                    if (known is None and self.has_just_started(attempt.job_id, now)) or (
                        known is not None and known.started_at < attempt.started_at
                    ):
                        running[attempt.job_id] = attempt
        return running


def _discard_oldest(
    remembered: OrderedDict[str, RunningAttempt] | OrderedDict[str, Order],
) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.popitem(last=False)
