"""The position of a waiting job in its queue: how many jobs the broker will deliver before it."""

import asyncio
from collections.abc import Callable

from msgspec import Struct
from nats.js.api import ConsumerInfo

from services.gateway.state.pending_job import Unfinished
from shared.broker.connection import Broker, StoredMessage
from shared.broker.consumers import ModelConsumers, read_model
from shared.wire import subjects

MAX_READS = 5
"""How often to count again while the queue changes between two counts."""

EVENT_DELAY_S = 0.1
"""How long the event of a started job may take to arrive here."""

READ_AHEAD_BYTES = 1024 * 1024


class QueuePosition(Struct, frozen=True):
    """Where a job stands in the queue of its model.

    ``waiting_by_priority`` counts the jobs of each priority that wait before this one.
    ``requeued`` counts jobs that were delivered before and will be redelivered, which come first.
    ``is_delivered``: this job itself was delivered; it starts in a moment or is redelivered.
    """

    model: ModelConsumers
    waiting_by_priority: dict[str, int]
    requeued: int = 0
    is_delivered: bool = False

    @property
    def waiting(self) -> int:
        return sum(self.waiting_by_priority.values())

    @property
    def ahead(self) -> int:
        return self.waiting + self.requeued


async def find_position(
    broker: Broker, job: Unfinished, count_requeued: Callable[[ModelConsumers], int]
) -> QueuePosition | None:
    """The position of ``job``; None if its model no longer exists. ``count_requeued`` estimates
    how many jobs of a model will be redelivered.

    Within the job's own priority, two answers are combined: the number of undelivered messages,
    and the number behind the job. If two counts in a row agree, they held at one moment. If the
    queue never stops changing, the last count is used; it lies between the true counts before and
    after it.

    Raises:
        BrokerUnavailable: no answer.
    """
    own = subjects.model_requests(job.model, job.priority)
    sequence = job.message.sequence
    last, position = None, None
    for _ in range(MAX_READS):
        model, found = await asyncio.gather(
            read_model(broker, job.model),
            broker.direct_get(subjects.REQUESTS, seq=sequence, next_by_subj=own, batch=1),
        )
        if model is None or job.priority not in model.by_class:
            return None
        position = position_of(sequence, job.priority, model, found, count_requeued(model))
        if position.is_delivered:
            return position
        counted = (
            position.waiting_by_priority,
            position.requeued,
            model.by_class[job.priority].num_pending,
        )
        if counted == last:
            break
        last = counted
        if position.requeued:
            # Such a job may also have started, with its event still on the way.
            await asyncio.sleep(EVENT_DELAY_S)
    return position


def position_of(
    sequence: int,
    priority: str,
    model: ModelConsumers,
    found: StoredMessage | None,
    requeued: int,
) -> QueuePosition:
    """The position of the message ``sequence`` of ``priority``, from one read each: ``model``, and
    ``found``, the first message of the queue from ``sequence`` on, with the number of those behind
    it in a header. ``requeued`` jobs of the model will be redelivered."""
    info = model.by_class[priority]
    higher = _waiting_with_higher_priority(model, priority)
    if found is None or found.sequence != sequence or _is_delivered(info, sequence):
        return QueuePosition(model, {**higher, priority: 0}, is_delivered=True)
    before = (info.num_pending or 0) - int(found.headers["Nats-Num-Pending"]) - 1
    return QueuePosition(model, {**higher, priority: max(before, 0)}, requeued)


def _is_delivered(info: ConsumerInfo, sequence: int) -> bool:
    return info.delivered is not None and info.delivered.stream_seq >= sequence


async def read_ahead(
    broker: Broker, job: Unfinished, position: QueuePosition, limit: int
) -> list[StoredMessage]:
    """Up to ``limit`` jobs before ``job``, in the order in which they will be served; fewer if
    they are large.

    Raises:
        BrokerUnavailable: no answer.
    """
    found: list[StoredMessage] = []
    for priority, count in position.waiting_by_priority.items():
        if not count or len(found) == limit:
            continue
        info = position.model.by_class[priority]
        delivered = info.delivered.stream_seq if info.delivered else 0
        found += await broker.direct_get_all(
            subjects.REQUESTS,
            seq=delivered + 1,
            next_by_subj=info.config.filter_subject,
            batch=min(count, limit - len(found)),
            max_bytes=READ_AHEAD_BYTES,
        )
    return [message for message in found if message.sequence != job.message.sequence]


def _waiting_with_higher_priority(model: ModelConsumers, priority: str) -> dict[str, int]:
    higher = subjects.CLASSES[: subjects.CLASSES.index(priority)]
    return {
        name: model.by_class[name].num_pending or 0 for name in higher if name in model.by_class
    }
