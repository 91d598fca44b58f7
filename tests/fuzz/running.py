"""Which jobs each inferer runs, as the broker announces it: who dies with them is then known."""

import json
import threading
from collections import defaultdict
from contextlib import suppress

from shared.wire import subjects
from tests.support.raw_nats import Closed, RawNats, Received

POLL_S = 0.05


class RunningJobs:
    """Hears what starts and what ends, on a thread of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._jobs: dict[str, set[str]] = defaultdict(set)
        self._ending = threading.Event()
        self._hearing = threading.Thread(target=self._hear, name="running-jobs")

    def start(self) -> None:
        self._hearing.start()

    def stop(self) -> None:
        self._ending.set()
        if self._hearing.is_alive():
            self._hearing.join()

    def lost_by(self, inferer: str) -> frozenset[str]:
        """The jobs that it had started and that had no result when it died; once for a death."""
        return frozenset(self._jobs.pop(inferer, ()))

    def _hear(self) -> None:
        while not self._ending.is_set():
            with suppress(OSError, Closed, TimeoutError), RawNats(self._port) as connection:
                connection.subscribe(subjects.STATES_WILDCARD.encode())
                connection.subscribe(subjects.FINISHED_WILDCARD.encode())
                while not self._ending.wait(POLL_S):
                    connection.settle()
                    for received in connection.received:
                        self._note(received)
                    connection.received.clear()
            self._ending.wait(POLL_S)

    def _note(self, received: Received) -> None:
        subject = received.subject.decode("utf-8", "replace")
        _, job_id = subjects.model_and_id(subject)
        if subject.startswith("infer.finished."):
            for jobs in list(self._jobs.values()):
                jobs.discard(job_id)
            return
        with suppress(ValueError, RecursionError, TypeError, KeyError):  # what the fuzzer has sent
            event = json.loads(received.data)
            inferer = event["inferer"]
            if event["state"] == "started":
                self._jobs[inferer].add(job_id)
            else:
                self._jobs[inferer].discard(job_id)
