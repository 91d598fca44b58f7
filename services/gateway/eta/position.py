"""A waiting job's place in its queue: how many will be served before it, counted by the broker."""

import asyncio
from collections.abc import Callable

from msgspec import Struct
from nats.js.api import ConsumerInfo

from services.gateway.state.pending_job import Unfinished
from shared.broker.connection import Broker, StoredMessage
from shared.broker.consumers import ModelConsumers, read_model
from shared.wire import subjects

LOOKS = 5
"""How often to count anew while the queue changes under the counting."""

NEWS_S = 0.1
"""How long the news of a job that has begun may take."""

SIZE_OF_A_READ = 1024 * 1024


class Place(Struct, frozen=True):
    """``by_class`` counts the jobs of each class that wait before this one, ``returned`` those that
    were given out before and come back, which are served first. ``is_given_out`` says that this
    one has been, too: it begins in a moment, or comes back."""

    model: ModelConsumers
    by_class: dict[str, int]
    returned: int = 0
    is_given_out: bool = False

    @property
    def waiting(self) -> int:
        return sum(self.by_class.values())

    @property
    def ahead(self) -> int:
        return self.waiting + self.returned


async def find_place(
    broker: Broker, job: Unfinished, returned: Callable[[ModelConsumers], int]
) -> Place | None:
    """Where ``job`` waits; None when its model is gone. ``returned`` counts jobs that come back.

    Its own class is counted from two answers: what has not been delivered, and what stands behind
    it. Two countings in a row that agree were true in between; a queue that never stands still
    gets the last one, which lies between the true counts before and after.

    Raises:
        BrokerUnavailable: no answer.
    """
    own = subjects.model_requests(job.model, job.priority)
    sequence = job.message.sequence
    last, place = None, None
    for _ in range(LOOKS):
        model, behind = await asyncio.gather(
            read_model(broker, job.model),
            broker.direct_get(subjects.REQUESTS, seq=sequence, next_by_subj=own, batch=1),
        )
        if model is None or job.priority not in model.by_class:
            return None
        info = model.by_class[job.priority]
        higher = _higher(model, job.priority)
        if behind is None or behind.sequence != sequence or _is_delivered(info, sequence):
            return Place(model, {**higher, job.priority: 0}, is_given_out=True)
        before = (info.num_pending or 0) - int(behind.headers["Nats-Num-Pending"]) - 1
        place = Place(model, {**higher, job.priority: max(before, 0)}, returned(model))
        counted = (place.by_class, place.returned, info.num_pending)
        if counted == last:
            break
        last = counted
        if place.returned:
            # Or it has begun, and the news of that is on its way.
            await asyncio.sleep(NEWS_S)
    return place


def _is_delivered(info: ConsumerInfo, sequence: int) -> bool:
    return info.delivered is not None and info.delivered.stream_seq >= sequence


async def read_ahead(
    broker: Broker, job: Unfinished, place: Place, most: int
) -> list[StoredMessage]:
    """The first ``most`` jobs before ``job``, in the order in which they will be served; fewer
    when they are large.

    Raises:
        BrokerUnavailable: no answer.
    """
    found: list[StoredMessage] = []
    for job_class, count in place.by_class.items():
        if not count or len(found) == most:
            continue
        info = place.model.by_class[job_class]
        delivered = info.delivered.stream_seq if info.delivered else 0
        found += await broker.direct_get_all(
            subjects.REQUESTS,
            seq=delivered + 1,
            next_by_subj=info.config.filter_subject,
            batch=min(count, most - len(found)),
            max_bytes=SIZE_OF_A_READ,
        )
    return [message for message in found if message.sequence != job.message.sequence]


def _higher(model: ModelConsumers, priority: str) -> dict[str, int]:
    """How many wait in the classes before this one."""
    ranks = subjects.CLASSES[: subjects.CLASSES.index(priority)]
    return {rank: model.by_class[rank].num_pending or 0 for rank in ranks if rank in model.by_class}
