"""The sequences of all requests on the queue, as the broker announces them.

The broker counts the messages between two sequences by reading them: the longer a queue, the
longer that takes. Here they are counted in memory.
"""

import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import suppress

from nats.aio.msg import Msg

from services.gateway.state.arrivals import Arrivals
from shared.background import Tasks
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.wire import subjects

DIFFERS_S = 1.0
"""How long what is known of a queue must differ from what the broker says before it is read again.
The two are not of one moment: a job that came or went between them makes a difference, too."""
READ_AGAIN_S = 30.0
"""How often the whole queue is read at most."""
MOST_EARLY = 10_000
"""Requests that may have been announced since a queue was read. More were not by the broker."""

PAGE = 500
PAGE_BYTES = 1024 * 1024
LAST_SEQUENCE = 2**64 - 1

Queue = tuple[str, str]
"""The token of a model, and a priority."""
Job = tuple[str, str]
"""The token of a model, and an id."""

log = logger()


class SequenceIndex:
    """The sequences of requests by their queues and jobs. No two are of one job."""

    def __init__(self) -> None:
        self._queues: dict[Queue, array[int]] = {}
        """Sequences in ascending order."""
        self._sequences: dict[Job, int] = {}
        self._requests: dict[int, subjects.RequestSubject] = {}
        """By their sequences."""

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def queues(self) -> list[Queue]:
        return list(self._queues)

    def size(self, queue: Queue) -> int:
        return len(self._queues.get(queue, ()))

    def add(self, request: subjects.RequestSubject, sequence: int) -> None:
        """Raises: ValueError: the sequence cannot be that of a message."""
        if not 0 < sequence <= LAST_SEQUENCE:
            raise ValueError(f"not a sequence: {sequence}")
        self.remove(request.model, request.job_id)
        if (other := self._requests.get(sequence)) is not None:
            # The stream was created again, and its sequences begin anew.
            self.remove(other.model, other.job_id)
        sequences = self._queues.setdefault((request.model, request.priority), array("Q"))
        sequences.insert(bisect_left(sequences, sequence), sequence)
        self._sequences[request.model, request.job_id] = sequence
        self._requests[sequence] = request

    def remove(self, model: str, job_id: str) -> None:
        sequence = self._sequences.pop((model, job_id), None)
        if sequence is None:
            return
        request = self._requests.pop(sequence)
        sequences = self._queues[request.model, request.priority]
        del sequences[bisect_left(sequences, sequence)]

    def forget(self, queue: Queue, last: int) -> None:
        """Remove the requests of ``queue`` up to the sequence ``last``."""
        sequences = self._queues.get(queue, array("Q"))
        end = bisect_right(sequences, last)
        for sequence in sequences[:end]:
            request = self._requests.pop(sequence)
            del self._sequences[request.model, request.job_id]
        del sequences[:end]
        if not sequences:
            self._queues.pop(queue, None)

    def count(self, queue: Queue, after: int, before: int, waiting: int) -> int | None:
        """How many requests of ``queue`` have a sequence between ``after``, the last that was
        delivered, and ``before``, that of a waiting one. None where this is not known: ``before``
        is not among them, or the broker says that ``waiting`` requests come after ``after``, and
        here it is another number."""
        sequences = self._queues.get(queue, array("Q"))
        first, index = bisect_right(sequences, after), bisect_left(sequences, before)
        if sequences[index : index + 1] != array("Q", [before]):
            return None
        return index - first if len(sequences) - first == waiting else None

    def first(self, queue: Queue, after: int, limit: int) -> list[subjects.RequestSubject]:
        """The first ``limit`` requests of ``queue`` with a sequence after ``after``."""
        sequences = self._queues.get(queue, array("Q"))
        begin = bisect_right(sequences, after)
        return [self._requests[sequence] for sequence in sequences[begin : begin + limit]]


class WaitingJobs:
    """The waiting jobs of every model and priority; without those that the broker puts back on
    the queue for a retry, which it does not announce."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._index: SequenceIndex | None = None
        """None while announcements may have been missed: until the queue was read once, and after
        each reconnect."""
        self._next_index: SequenceIndex | None = None
        """What is read now."""
        self._differs_since: dict[Queue, float] = {}
        self._tasks = Tasks()
        self._read_at = -READ_AGAIN_S
        self.arrivals = Arrivals()
        self._on_accept: list[Callable[[str], None]] = []
        broker.on_reconnect(self._forget_all)

    async def follow(self) -> None:
        """Subscribe to the announcements. The first count reads what waits already."""
        await self._broker.nc.subscribe_directly(subjects.ACCEPTED_WILDCARD, self._on_announcement)

    def on_accepted(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the token of the model of each job that comes."""
        self._on_accept.append(callback)

    async def close(self) -> None:
        await self._tasks.end(timeout_s=0)

    def on_end(self, model: str, job_id: str) -> None:
        """A job has a result: it leaves the queue, whether or not it ran."""
        for index in self._indexes():
            index.remove(model, job_id)

    def on_queues_read(self, models: dict[str, ModelConsumers]) -> None:
        """Forget what the queues do not hold, as they were read just now: ends may be missed, and
        announcements forged."""
        for index in self._indexes():
            for queue in index.queues:
                model, priority = queue
                info = models[model].by_priority.get(priority) if model in models else None
                if info is not None:
                    index.forget(queue, models[model].last_delivered(priority))
                if info is None or index.size(queue) > (info.num_pending or 0) + MOST_EARLY:
                    index.forget(queue, LAST_SEQUENCE)

    def count(self, queue: Queue, after: int, before: int, waiting: int) -> int | None:
        """See `SequenceIndex.count`. Where it is not known, and was not a moment ago, the queue is
        read in the background."""
        if self._index is not None:
            counted = self._index.count(queue, after, before, waiting)
            if counted is not None:
                self._differs_since.pop(queue, None)
                return counted
            now = time.monotonic()
            if now - self._differs_since.setdefault(queue, now) < DIFFERS_S:
                return None
        is_due = time.monotonic() - self._read_at > READ_AGAIN_S
        if is_due and self._next_index is None:
            self._next_index = SequenceIndex()
            self._tasks.start(self._read(self._next_index), "read the waiting jobs")
        return None

    def first(self, model: ModelConsumers, limit: int) -> list[subjects.RequestSubject] | None:
        """The first ``limit`` waiting jobs of ``model`` in the order of delivery; None where they
        are not known."""
        if self._index is None:
            return None
        found: list[subjects.RequestSubject] = []
        for priority in subjects.PRIORITIES:
            queue, after = (model.token, priority), model.last_delivered(priority)
            found += self._index.first(queue, after, limit - len(found))
        return found

    def _indexes(self) -> list[SequenceIndex]:
        return [index for index in (self._index, self._next_index) if index is not None]

    def _forget_all(self) -> None:
        self._index = self._next_index = None
        self._differs_since.clear()

    def _on_announcement(self, message: Msg) -> None:
        headers = message.headers or {}
        with suppress(KeyError, ValueError):  # published by something other than the broker
            request = subjects.RequestSubject.parse(headers["Nats-Subject"])
            sequence = int(headers["Nats-Sequence"])
            self.arrivals.note((request.model, request.priority))
            for callback in self._on_accept:
                callback(request.model)
            for index in self._indexes():
                index.add(request, sequence)

    async def _read(self, found: SequenceIndex) -> None:
        """Replace what is known by what the broker holds; what it announces meanwhile is added."""
        pages = self._broker.pages(
            subjects.REQUESTS, subjects.REQUESTS_WILDCARD, batch=PAGE, max_bytes=PAGE_BYTES
        )
        try:
            async for page in pages:
                for message in page:
                    with suppress(ValueError):  # its id is longer than any of ours
                        request = subjects.RequestSubject.parse(message.subject)
                        found.add(request, message.sequence)
            if self._next_index is found:  # no reconnect meanwhile
                before, self._index = len(self._index or ()), found
                self._differs_since.clear()
                log.info("waiting_jobs_read", before=before, found=len(found))
        except BrokerUnavailable as error:
            log.warning("waiting_jobs_not_read", error=error.message)
        finally:
            if self._next_index is found:
                self._next_index = None
            self._read_at = time.monotonic()
