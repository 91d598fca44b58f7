"""Everything the broker says aloud, heard at every node at the same time."""

from collections import defaultdict
from dataclasses import dataclass

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from shared import subjects
from shared.messages import decode_state_event


@dataclass(frozen=True)
class Running:
    """What an inferer started last."""

    job_id: str
    max_tokens: int


class Listener:
    """Core subscribers, one at each node: what one misses while its node is dead, others hear."""

    def __init__(self) -> None:
        self.announced: dict[str, set[tuple[int, bytes]]] = defaultdict(set)
        """For each job the different announcements: sequence in RESULTS, and what was stored."""
        self.running: dict[str, Running] = {}
        self._connections: list[Client] = []

    async def connect(self, urls: list[str]) -> None:
        for url in urls:
            connection = await nats.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.1,
                error_cb=_ignore,
            )
            self._connections.append(connection)
            await connection.subscribe(subjects.FINISHED_WILDCARD, cb=self._hear_result)
            await connection.subscribe(subjects.state_events("*"), cb=self._hear_state)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    def is_running(self, inferer: str, min_tokens: int) -> str | None:
        """The job that ``inferer`` runs, if it is so long that there is time to strike."""
        running = self.running.get(inferer)
        if running is None or running.max_tokens < min_tokens or running.job_id in self.announced:
            return None
        return running.job_id

    def inferer_of(self, job_id: str) -> str | None:
        """Who started this job last, if it has not started another since."""
        runs = (name for name, running in self.running.items() if running.job_id == job_id)
        return next(runs, None)

    async def _hear_result(self, message: Msg) -> None:
        sequence = int((message.headers or {}).get("Nats-Sequence", 0))
        self.announced[subjects.last_token(message.subject)].add((sequence, message.data))

    async def _hear_state(self, message: Msg) -> None:
        event = decode_state_event(message.data)
        if event.state == "started" and event.work is not None:
            job_id = message.subject.split(".")[2]
            self.running[event.inferer] = Running(job_id, event.work.max_tokens)


async def _ignore(_: Exception) -> None:
    """A node that is dead is what this is all about."""
