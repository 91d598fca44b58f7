"""Everything the broker announces, received at every node at the same time."""

import time
from collections import defaultdict
from typing import NamedTuple

from nats.aio.msg import Msg

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.wire import subjects
from shared.wire.codecs import decode_state_event


class Attempt(NamedTuple):
    most_tokens: int
    started: float
    """`time.monotonic`"""


class Listener:
    """Core subscribers, one at each node: what one misses while its node is dead, others get."""

    def __init__(self) -> None:
        self.announced: dict[str, set[tuple[int, bytes]]] = defaultdict(set)
        """For each job the different announcements: sequence in RESULTS, and what was stored."""
        self._running: dict[str, dict[str, Attempt]] = defaultdict(dict)
        """For each inferer the jobs that it has started."""
        self._connections: list[Broker] = []

    async def connect(self, urls: list[str]) -> None:
        for url in urls:
            connection = Broker(BrokerSettings(url=url), "listener")
            await connection.connect()
            self._connections.append(connection)
            await connection.nc.subscribe(subjects.FINISHED_WILDCARD, cb=self._hear_result)
            await connection.nc.subscribe(subjects.STATES_WILDCARD, cb=self._hear_state)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    def is_running(self, inferer: str, min_tokens: int, since: float) -> str | None:
        """A job that ``inferer`` runs, one that is so long that there is time to strike. It began
        after ``since``, when the process was launched: a job of the one before died with it."""
        for job_id, attempt in self._running[inferer].items():
            if attempt.most_tokens >= min_tokens and attempt.started > since:
                return job_id
        return None

    def inferer_of(self, job_id: str) -> str | None:
        """The inferer that runs this job."""
        return next((name for name, jobs in self._running.items() if job_id in jobs), None)

    async def _hear_result(self, message: Msg) -> None:
        sequence = int((message.headers or {}).get("Nats-Sequence", 0))
        if sequence == 0:
            return  # rubbish that a fault has sent: no stream has announced it
        job_id = subjects.model_and_id(message.subject)[1]
        self.announced[job_id].add((sequence, message.data))
        self._forget(job_id)

    async def _hear_state(self, message: Msg) -> None:
        try:
            event = decode_state_event(message.data)
        except (ValueError, RecursionError):
            return  # likewise
        job_id = subjects.model_and_id(message.subject)[1]
        self._forget(job_id)
        # With a code it is the report that the attempt died with its inferer.
        runs = event.state == "started" and event.code is None and job_id not in self.announced
        if runs and event.work is not None:
            self._running[event.inferer][job_id] = Attempt(event.work.max_tokens, time.monotonic())

    def _forget(self, job_id: str) -> None:
        for jobs in self._running.values():
            jobs.pop(job_id, None)
