"""The consumers of each model, one per priority: their settings, and the state of their queues."""

import asyncio
import time
from dataclasses import dataclass, field
from datetime import datetime

import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo

from shared.broker.connection import Broker, unavailable_on_outage
from shared.broker.metadata import CONSUMER_THRESHOLDS, merged
from shared.broker.stored_messages import StoredMessage
from shared.errors import BrokerUnavailable, TopologyError
from shared.model_names import name_of, token_of
from shared.timestamps import parse_timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_model_facts, encode
from shared.wire.inferers import ModelFacts
from shared.wire.requests import priority_of

FACTS, NAME = "sluice.facts", "sluice.name"
OWN_METADATA = {FACTS, NAME}
"""The metadata of a model's normal consumer: how it is remembered while no inferer is alive."""

OTHER_WIRE = (
    "this broker holds the queues of another version of Sluice, whose messages this one cannot "
    "read: let them run empty with that version, then start this one with a new store "
    "(sluice up --data, or another broker)"
)

CONSUMERS_PAGE = 256
"""As many as the broker lists at a time."""


@dataclass
class GroupedConsumerConfig(ConsumerConfig):
    """The client's configuration with the fields it does not know yet."""

    max_batch: int | None = None
    priority_groups: list[str] = field(default_factory=list)
    priority_policy: str | None = None


def consumer(
    model: str,
    priority: str,
    ack_wait_s: float,
    limit: int,
    facts: ModelFacts | None,
    held_metadata: dict[str, str] | None = None,
) -> GroupedConsumerConfig:
    """The whole configuration of one of a model's consumers: an update replaces every field, but
    keeps what others have added to ``held_metadata``, that of the existing consumer.

    ``limit`` is one for each live slot, and at least 1: the broker itself delivers no further job
    of this priority. Across priorities, each slot holds only one message.
    """
    metadata = dict(CONSUMER_THRESHOLDS)
    if facts is not None:
        metadata[FACTS] = encode(facts).decode()
    if model != token_of(model):
        metadata[NAME] = model
    return GroupedConsumerConfig(
        name=subjects.consumer(model, priority),  # with it the client asks by name and filter
        durable_name=subjects.consumer(model, priority),
        description=f"Sluice: jobs of priority {priority} for {model}",
        filter_subject=subjects.model_requests(model, priority),
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait_s,
        max_ack_pending=limit,
        max_batch=1,
        max_deliver=-1,
        max_waiting=16_384,
        metadata=merged(metadata, held_metadata, OWN_METADATA),
        priority_groups=[subjects.PRIORITY_GROUP],
        priority_policy="prioritized",
    )


@dataclass(frozen=True)
class ModelConsumers:
    """The consumers of one model, by priority; only the normal one is certain to exist."""

    token: str
    by_priority: dict[str, ConsumerInfo]
    asked_at: float = 0.0
    """When the broker was asked for them (`time.monotonic`); they may be older than that."""

    @property
    def name(self) -> str:
        """What users call the model."""
        metadata = self.by_priority[subjects.NORMAL].config.metadata or {}
        return name_of(self.token, metadata.get(NAME))

    @property
    def limit(self) -> int:
        return self.by_priority[subjects.NORMAL].config.max_ack_pending or 1

    @property
    def waiting(self) -> int:
        return sum(info.num_pending or 0 for info in self.by_priority.values())

    @property
    def in_flight(self) -> int:
        return sum(info.num_ack_pending or 0 for info in self.by_priority.values())

    @property
    def delivered(self) -> int:
        """Deliveries so far, including redeliveries."""
        infos = self.by_priority.values()
        return sum(info.delivered.consumer_seq for info in infos if info.delivered)

    @property
    def redelivered(self) -> int:
        return sum(info.num_redelivered or 0 for info in self.by_priority.values())

    def last_delivered(self, priority: str) -> int:
        """The last sequence of this priority that was delivered; 0 if none was."""
        info = self.by_priority.get(priority)
        return info.delivered.stream_seq if info and info.delivered else 0

    def was_delivered(self, request: subjects.RequestSubject, message: StoredMessage) -> bool:
        """Whether an inferer may have had the job: its message, or an earlier one that was put
        back on the queue for a retry."""
        priority = priority_of(request.priority)
        is_unknown = priority not in self.by_priority or request.is_scheduled
        if is_unknown or subjects.HEADER_SCHEDULER in message.headers:
            return True
        return message.sequence <= self.last_delivered(priority)

    @property
    def created(self) -> datetime | None:
        return self.by_priority[subjects.NORMAL].created

    @property
    def facts(self) -> ModelFacts | None:
        """What is remembered of the model; None until an inferer has served it once."""
        config = self.by_priority[subjects.NORMAL].config
        remembered = (config.metadata or {}).get(FACTS)
        if remembered is None:
            return None
        return decode_model_facts.read(remembered, config.filter_subject or self.name)

    def is_set(self, name: str, limit: int, facts: ModelFacts | None) -> bool:
        """Whether all priorities have a consumer with this limit, and name and facts are stored."""
        limits = [info.config.max_ack_pending for info in self.by_priority.values()]
        return limits == [limit] * len(subjects.PRIORITIES) and (self.name, self.facts) == (
            name,
            facts,
        )


async def read_models(broker: Broker) -> dict[str, ModelConsumers]:
    """The models that exist, by token; other consumers on REQUESTS are left out.

    Raises:
        BrokerUnavailable: no answer, or no stream.
    """
    found: dict[str, dict[str, ConsumerInfo]] = {}
    asked_at = time.monotonic()
    with unavailable_on_outage(broker):
        infos = await list_consumers(broker)
    for info in infos:
        if (priority := priority_of_consumer(info)) is not None:
            found.setdefault(subjects.parse_consumer(info.name)[0], {})[priority] = info
    return {
        model: ModelConsumers(model, by_priority, asked_at)
        for model, by_priority in found.items()
        if subjects.NORMAL in by_priority
    }


async def read_model(broker: Broker, name: str) -> ModelConsumers | None:
    """One model's consumers; None when it does not exist.

    Raises:
        BrokerUnavailable: no answer.
    """
    asked_at = time.monotonic()
    infos = await asyncio.gather(*(read_consumer(broker, name, c) for c in subjects.PRIORITIES))
    by_priority = {c: info for c, info in zip(subjects.PRIORITIES, infos, strict=True) if info}
    if subjects.NORMAL not in by_priority:
        return None
    return ModelConsumers(token_of(name), by_priority, asked_at)


async def read_consumer(broker: Broker, model: str, priority: str) -> ConsumerInfo | None:
    """The consumer of one priority of a model's jobs; None if it does not exist.

    Raises:
        BrokerUnavailable: no answer.
    """
    with unavailable_on_outage(broker):
        try:
            consumer_name = subjects.consumer(model, priority)
            info = await broker.js.consumer_info(subjects.REQUESTS, consumer_name)
        except nats.js.errors.NotFoundError:
            return None
    return info if priority_of_consumer(info) == priority else None


async def require_own_wire(broker: Broker, model: str) -> None:
    """Return once the broker has said that it holds no queue of another wire version for the model.

    Raises:
        TopologyError: it does. Its messages would be taken off the queue as unreadable.
    """
    name = subjects.consumer(model, subjects.NORMAL)

    async def read() -> ConsumerInfo:
        with unavailable_on_outage(broker):
            found: ConsumerInfo = await broker.js.consumer_info(subjects.REQUESTS, name)
            return found

    try:
        info = await broker.through_outages(read)
    except nats.js.errors.NotFoundError:
        return
    if info.config.filter_subject != subjects.model_requests(model):
        raise TopologyError(OTHER_WIRE)


async def oldest_waiting_s(broker: Broker, model: ModelConsumers) -> float | None:
    """How long the oldest waiting job of any priority has waited; None if no job waits.

    Raises:
        BrokerUnavailable: no answer.
    """
    oldest = [
        await broker.direct_get(
            subjects.REQUESTS,
            seq=(info.delivered.stream_seq if info.delivered else 0) + 1,
            next_by_subj=info.config.filter_subject,
        )
        for info in model.by_priority.values()
        if info.num_pending
    ]
    now = broker.now()
    ages = [now - parse_timestamp(message.time) for message in oldest if message is not None]
    return round(max(ages).total_seconds(), 3) if ages else None


async def ensure_consumers(
    broker: Broker, ack_wait_s: float, model: str, limit: int, facts: ModelFacts | None
) -> None:
    """Create the model's consumers, one per priority, or replace their configuration.

    Raises:
        BrokerUnavailable: no answer, or no stream.
        TopologyError: a consumer of that name exists that cannot be changed into ours.
    """
    for priority in subjects.PRIORITIES:
        remembered = facts if priority == subjects.NORMAL else None
        held = await read_consumer(broker, model, priority)
        metadata = held.config.metadata if held else None
        config = consumer(model, priority, ack_wait_s, limit, remembered, metadata)
        try:
            with unavailable_on_outage(broker):
                await broker.js.add_consumer(subjects.REQUESTS, config)
        except nats.js.errors.NotFoundError:
            raise BrokerUnavailable(f"the stream {subjects.REQUESTS} is missing") from None
        except nats.js.errors.APIError as error:
            name = config.durable_name
            raise TopologyError(
                f"the consumer {name} on REQUESTS cannot be changed: {error.description}; "
                f"remove it with: nats consumer rm REQUESTS {name}"
            ) from error


async def list_consumers(broker: Broker) -> list[ConsumerInfo]:
    """All consumers of REQUESTS, page by page.

    Raises:
        BrokerUnavailable: no such stream, or this node does not know it yet.
    """
    found: list[ConsumerInfo] = []
    while True:
        try:
            page = await broker.js.consumers_info(subjects.REQUESTS, offset=len(found))
        except nats.js.errors.NotFoundError:
            raise BrokerUnavailable(f"the stream {subjects.REQUESTS} is missing") from None
        found += page
        if len(page) < CONSUMERS_PAGE:
            return found


def priority_of_consumer(info: ConsumerInfo) -> str | None:
    """The priority whose jobs this consumer of REQUESTS holds; None if it is not a model's."""
    try:
        model, priority = subjects.parse_consumer(info.name)
    except ValueError:
        return None
    ours = info.config.filter_subject == subjects.model_requests(model, priority)
    return priority if ours else None
