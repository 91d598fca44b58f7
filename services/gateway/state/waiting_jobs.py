"""The sequences of all requests on the queue, as the broker announces them.

The broker counts the messages between two sequences by reading them: the longer a queue, the
longer that takes. Here they are counted in memory.
"""

import time
from array import array
from bisect import bisect_left, bisect_right
from contextlib import suppress

from nats.aio.msg import Msg

from shared.background import Tasks
from shared.broker.connection import Broker
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.wire import subjects

READ_AGAIN_S = 30.0
"""How often the whole queue is read at most, while what is known of it is wrong."""

PAGE = 500
PAGE_BYTES = 1024 * 1024

Queue = tuple[str, str]
"""The token of a model, and a priority."""

log = logger()


class SequenceIndex:
    """The sequences of requests, by their queues and by the ids of their jobs."""

    def __init__(self) -> None:
        self._sequences: dict[Queue, array[int]] = {}
        """In ascending order."""
        self._by_id: dict[str, tuple[subjects.RequestSubject, int]] = {}
        self._ids: dict[int, str] = {}
        """By their sequences."""

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request: subjects.RequestSubject, sequence: int) -> None:
        self.remove(request.job_id)
        queue = request.model, request.priority
        sequences = self._sequences.setdefault(queue, array("Q"))
        sequences.insert(bisect_left(sequences, sequence), sequence)
        self._by_id[request.job_id] = request, sequence
        self._ids[sequence] = request.job_id

    def remove(self, job_id: str) -> None:
        found = self._by_id.pop(job_id, None)
        if found is None:
            return
        request, sequence = found
        if self._ids.get(sequence) == job_id:  # not that of a stream that was created again
            del self._ids[sequence]
        sequences = self._sequences[request.model, request.priority]
        index = bisect_left(sequences, sequence)
        if index < len(sequences) and sequences[index] == sequence:
            del sequences[index]

    def count(self, queue: Queue, after: int, before: int, waiting: int) -> int | None:
        """How many requests of ``queue`` have a sequence between ``after``, the last that was
        delivered, and ``before``. None where this is not known: the broker says that ``waiting``
        requests come after ``after``, and here it is another number."""
        sequences = self._sequences.get(queue, array("Q"))
        first = bisect_right(sequences, after)
        if len(sequences) - first != waiting:
            return None
        for sequence in sequences[:first]:
            self._ids.pop(sequence, None)
        del sequences[:first]  # nobody asks for what was delivered
        return bisect_left(sequences, before)

    def next_subjects(self, queue: Queue, after: int, before: int, limit: int) -> list[str]:
        """The subjects of the first ``limit`` requests of ``queue`` that have a sequence between
        ``after`` and ``before``."""
        sequences = self._sequences.get(queue, array("Q"))
        first, end = bisect_right(sequences, after), bisect_left(sequences, before)
        following = sequences[first : min(end, first + limit)]
        known = (self._by_id.get(self._ids.get(sequence, "")) for sequence in following)
        return [request.request for request, _ in filter(None, known)]


class WaitingJobs:
    """The waiting jobs of every model and priority; without those that the broker puts back on
    the queue for a retry, which it does not announce."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._index = SequenceIndex()
        self._tasks = Tasks()
        self._is_reading = False
        self._read_at = -READ_AGAIN_S

    async def follow(self) -> None:
        """Subscribe to the announcements. What is missed of them, the next count finds out."""
        await self._broker.nc.subscribe(subjects.ACCEPTED_WILDCARD, cb=self._on_accepted)

    async def close(self) -> None:
        await self._tasks.end(timeout_s=0)

    def on_end(self, job_id: str) -> None:
        """A job has a result: it leaves the queue, whether or not it ran."""
        self._index.remove(job_id)

    def count(self, queue: Queue, after: int, before: int, waiting: int) -> int | None:
        """See `SequenceIndex.count`. Where it is not known, the queue is read in the
        background."""
        counted = self._index.count(queue, after, before, waiting)
        is_due = time.monotonic() - self._read_at > READ_AGAIN_S
        if counted is None and is_due and not self._is_reading:
            self._is_reading = True
            self._tasks.start(self._read(), "read the waiting jobs")
        return counted

    def next_subjects(self, queue: Queue, after: int, before: int, limit: int) -> list[str]:
        """See `SequenceIndex.next_subjects`; after a successful `count`."""
        return self._index.next_subjects(queue, after, before, limit)

    async def _on_accepted(self, message: Msg) -> None:
        headers = message.headers or {}
        with suppress(KeyError, ValueError):  # published by something other than the broker
            request = subjects.RequestSubject.parse(headers["Nats-Subject"])
            self._index.add(request, int(headers["Nats-Sequence"]))

    async def _read(self) -> None:
        """Replace what is known by what the broker holds; what it announces meanwhile is added."""
        before, self._index = len(self._index), SequenceIndex()
        pages = self._broker.pages(
            subjects.REQUESTS, subjects.REQUESTS_WILDCARD, batch=PAGE, max_bytes=PAGE_BYTES
        )
        try:
            async for page in pages:
                for message in page:
                    request = subjects.RequestSubject.parse(message.subject)
                    self._index.add(request, message.sequence)
            log.info("waiting_jobs_read", before=before, found=len(self._index))
        except (BrokerUnavailable, ValueError) as error:
            log.warning("waiting_jobs_not_read", error=str(error))
        finally:
            self._is_reading = False
            self._read_at = time.monotonic()
