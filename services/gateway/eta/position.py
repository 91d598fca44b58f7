"""The position of a waiting job in its queue: how many jobs the broker will deliver before it."""

import asyncio
from collections.abc import Callable, Sequence

from msgspec import Struct
from nats.js.api import ConsumerInfo

from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import PendingJob
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage
from shared.model_names import token_of
from shared.wire import subjects

EVENT_DELAY_S = 0.1
"""How long the event of a started job may take to arrive here."""

MAX_AHEAD = 32
"""How many of the jobs directly before a job are read; the others are assumed to be typical."""
AHEAD_BYTES = 1024 * 1024


class QueuePosition(Struct, frozen=True):
    """Where a job stands in the queue of its model.

    ``waiting_by_priority`` counts the jobs of each priority that wait before this one.
    ``requeued`` counts jobs that were delivered before and will be redelivered, which come first.
    ``is_delivered``: this job itself was delivered; it starts in a moment or is redelivered.
    ``next_requests`` are the first of the waiting jobs of its own priority, if they were read to
    count those.
    """

    model: ModelConsumers
    waiting_by_priority: dict[str, int]
    requeued: int = 0
    is_delivered: bool = False
    next_requests: Sequence[StoredMessage] | None = None

    @property
    def waiting(self) -> int:
        return sum(self.waiting_by_priority.values())

    @property
    def ahead(self) -> int:
        return self.waiting + self.requeued


async def find_position(
    broker: Broker,
    fleet: Fleet,
    waiting_jobs: WaitingJobs,
    job: PendingJob,
    model: ModelConsumers,
    count_requeued: Callable[[ModelConsumers], int],
) -> QueuePosition:
    """The position of ``job`` in the queues of ``model``. ``count_requeued`` estimates how many
    jobs of a model will be redelivered.

    Costs nothing where this gateway has counted the jobs between, else two reads.

    Raises:
        BrokerUnavailable: no answer.
    """
    token, sequence = token_of(job.model), job.message.sequence
    info = model.by_priority[job.priority]
    delivered = _delivered(info)
    if sequence <= delivered:
        return position_of(job.priority, model, None)
    own = subjects.model_requests(job.model, job.priority)
    between = waiting_jobs.count((token, job.priority), delivered, sequence, info.num_pending or 0)
    following = None
    if between is None:
        following, found = await asyncio.gather(
            broker.direct_get_all(
                subjects.REQUESTS,
                seq=delivered + 1,
                next_by_subj=own,
                batch=MAX_AHEAD,
                max_bytes=AHEAD_BYTES,
            ),
            broker.direct_get(subjects.REQUESTS, seq=sequence, next_by_subj=own, batch=1),
        )
        between = count_between(sequence, following, found)
        following = [message for message in following if message.sequence < sequence]
    requeued = count_requeued(model)
    if requeued:
        # Such a job may also have started, with its event still on the way.
        await asyncio.sleep(EVENT_DELAY_S)
        model = (await fleet.queues()).get(token, model)
        requeued = count_requeued(model)
    return position_of(job.priority, model, between, requeued, following)


async def read_next_requests(
    broker: Broker, waiting_jobs: WaitingJobs, job: PendingJob, position: QueuePosition
) -> Sequence[StoredMessage]:
    """The first of the requests of its own priority that wait before ``job``, `MAX_AHEAD` at most.

    They are read by subject: for a range, the broker would also count what follows each one.

    Raises:
        BrokerUnavailable: no answer.
    """
    if position.next_requests is not None:
        return position.next_requests
    names = waiting_jobs.next_subjects(
        (position.model.token, job.priority),
        _delivered(position.model.by_priority[job.priority]),
        job.message.sequence,
        MAX_AHEAD,
    )
    if not names:
        return ()
    return await broker.direct_get_all(subjects.REQUESTS, multi_last=names, max_bytes=AHEAD_BYTES)


def position_of(
    priority: str,
    model: ModelConsumers,
    between: int | None,
    requeued: int = 0,
    next_requests: Sequence[StoredMessage] | None = None,
) -> QueuePosition:
    """The position of a job with ``between`` waiting jobs of its own priority before it; None if
    it was delivered itself."""
    higher = _waiting_with_higher_priority(model, priority)
    if between is None:
        return QueuePosition(model, {**higher, priority: 0}, is_delivered=True)
    return QueuePosition(
        model, {**higher, priority: between}, requeued, next_requests=next_requests
    )


def count_between(
    sequence: int, following: list[StoredMessage], found: StoredMessage | None
) -> int | None:
    """How many messages of a queue come before ``sequence``, from two reads at one moment:
    ``following``, the first of all that wait, and ``found``, the first one from ``sequence`` on.
    Each says in a header how many come after it. None if ``sequence`` does not wait any more."""
    if found is None or found.sequence != sequence or not following:
        return None
    return max(following[0].pending_after - found.pending_after, 0)


def _delivered(info: ConsumerInfo) -> int:
    """The last sequence that the consumer has delivered."""
    return info.delivered.stream_seq if info.delivered else 0


def higher_than(priority: str) -> Sequence[str]:
    """The priorities whose jobs are delivered before those of ``priority``."""
    return subjects.PRIORITIES[: subjects.PRIORITIES.index(priority)]


def _waiting_with_higher_priority(model: ModelConsumers, priority: str) -> dict[str, int]:
    return {
        name: model.by_priority[name].num_pending or 0
        for name in higher_than(priority)
        if name in model.by_priority
    }
