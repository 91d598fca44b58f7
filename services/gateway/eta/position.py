"""The position of a waiting job in its queue: how many jobs the broker will deliver before it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from msgspec import Struct

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


class QueuedJob(Struct, frozen=True):
    """A job on the queue that does not run. ``between`` counts the jobs of its own priority that
    wait before it; None if it was delivered itself."""

    request: subjects.RequestSubject
    deadline: datetime | None
    between: int | None


class QueuePosition(Struct, frozen=True):
    """Where a job stands in the queue of its model.

    ``waiting`` counts the jobs that wait before this one. ``requeued`` counts jobs that were
    delivered before and will be redelivered, which come first. ``is_delivered``: this
    job itself was delivered; it starts in a moment or is redelivered.
    """

    model: ModelConsumers
    waiting: int
    requeued: int = 0
    is_delivered: bool = False

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
    if sequence > model.last_delivered(job.priority):
        model = (await settled(fleet, {token: model}, count_requeued))[token]
    delivered = model.last_delivered(job.priority)
    if sequence <= delivered:
        return position_of(job.priority, model, None)
    waiting = model.by_priority[job.priority].num_pending or 0
    between = waiting_jobs.count((token, job.priority), delivered, sequence, waiting)
    if between is None:
        own = subjects.model_requests(job.model, job.priority)
        reads = (
            broker.direct_get(subjects.REQUESTS, seq=begin, next_by_subj=own, batch=1)
            for begin in (delivered + 1, sequence)
        )
        between = count_between(sequence, *await asyncio.gather(*reads))
    return position_of(job.priority, model, between, count_requeued(model))


async def settled(
    fleet: Fleet,
    models: Mapping[str, ModelConsumers],
    count_requeued: Callable[[ModelConsumers], int],
) -> Mapping[str, ModelConsumers]:
    """``models`` by their tokens, read again a moment later if jobs of one seem to be redelivered:
    such a job may also have started, with its event still on the way.

    Raises:
        BrokerUnavailable: no answer.
    """
    if not any(map(count_requeued, models.values())):
        return models
    await asyncio.sleep(EVENT_DELAY_S)
    now = await fleet.queues()
    return {token: now.get(token, model) for token, model in models.items()}


def position_of(
    priority: str,
    model: ModelConsumers,
    between: int | None,
    requeued: int = 0,
) -> QueuePosition:
    """The position of a job with ``between`` waiting jobs of its own priority before it; None if
    it was delivered itself."""
    higher = _waiting_with_higher_priority(model, priority)
    if between is None:
        return QueuePosition(model, higher, is_delivered=True)
    return QueuePosition(model, higher + between, requeued)


def count_between(
    sequence: int, first: StoredMessage | None, found: StoredMessage | None
) -> int | None:
    """How many messages of a queue come before ``sequence``, from two reads at one moment:
    ``first``, the first of all that wait, and ``found``, the first one from ``sequence`` on. Each
    says in a header how many come after it. None if ``sequence`` does not wait any more."""
    if first is None or found is None or found.sequence != sequence:
        return None
    return max(first.pending_after - found.pending_after, 0)


def higher_than(priority: str) -> Sequence[str]:
    """The priorities whose jobs are delivered before those of ``priority``."""
    return subjects.PRIORITIES[: subjects.PRIORITIES.index(priority)]


def _waiting_with_higher_priority(model: ModelConsumers, priority: str) -> int:
    return sum(
        model.by_priority[name].num_pending or 0
        for name in higher_than(priority)
        if name in model.by_priority
    )
