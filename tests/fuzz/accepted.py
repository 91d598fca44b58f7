"""Every job that was accepted, and whether it ended once."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator

from nats.aio.msg import Msg

from shared.broker.connection import Broker
from shared.broker.results import decode_stored
from shared.config import BrokerSettings
from shared.wire import subjects
from shared.wire.results import Failed, Result
from tests.chaos.store import queued, stream_info
from tests.fuzz.site import Site

EMPTY_WITHIN_S = 180.0
READ_TIMEOUT_S = 20.0


class Accepted:
    """The ids that clients were given."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        """Each with what was sent."""
        self.ended: Counter[str] = Counter()
        """How they ended: ``completed``, or the code of the failure."""
        self._lock = threading.Lock()

    def add(self, job_id: str, case: str) -> None:
        with self._lock:
            self.ids[job_id] = case

    def faults(self, site: Site) -> Iterator[tuple[str, str]]:
        """``(kind, what)``, once nothing is sent any more."""
        results, left, stored, held = asyncio.run(self._read(site.node.url))
        for subject in left:
            yield "a job never ended", f"{subject} is still in the queue"
        if stored != held:
            yield "a second result", f"{stored} results were stored, {held} are there"
        for job_id, case in self.ids.items():
            found = results.get(job_id, [])
            if not found and job_id not in left:
                yield "an accepted job was lost", f"{job_id} has no result; it was {case[:500]}"
            if len(found) > 1:
                yield "a second result", f"{job_id} has {len(found)} results"
            for result in found:
                self.ended[getattr(result, "code", "completed")] += 1
        yield from _unnamed_deaths(site, results)

    async def _read(self, url: str) -> tuple[dict[str, list[Result]], list[str], int, int]:
        """The results of accepted jobs, what is left in the queue, and how many results were
        stored altogether and are there now."""
        broker = Broker(BrokerSettings(url=url), "fuzz")
        await broker.connect()
        try:
            deadline = time.monotonic() + EMPTY_WITHIN_S
            while (left := await queued(broker)) and time.monotonic() < deadline:
                await asyncio.sleep(0.5)
            results: dict[str, list[Result]] = {}
            info = await stream_info(broker, subjects.RESULTS)
            reading = await broker.js.subscribe(
                subjects.RESULTS_WILDCARD, stream=subjects.RESULTS, ordered_consumer=True
            )
            for _ in range(info.state.messages):
                message: Msg = await reading.next_msg(READ_TIMEOUT_S)
                job_id = subjects.model_and_id(message.subject)[1]
                if job_id in self.ids:
                    stored = decode_stored(
                        message.subject, message.data, message.metadata.timestamp
                    )
                    results.setdefault(job_id, []).append(stored)
            return results, left, info.state.last_seq, info.state.messages
        finally:
            await broker.close()


def _unnamed_deaths(site: Site, results: dict[str, list[Result]]) -> Iterator[tuple[str, str]]:
    """An inferer may die only of a job that has ended as `worker_lost` for it."""
    blamed = {
        job_id
        for job_id, found in results.items()
        if any(isinstance(result, Failed) and result.code == "worker_lost" for result in found)
    }
    for death in site.deaths:
        if death.name.startswith("inferer") and not death.jobs & blamed:
            yield (
                "an inferer died of no job that is named",
                f"{death.name}, exit status {death.status}, was running {sorted(death.jobs)}:\n"
                f"{death.tail}",
            )
