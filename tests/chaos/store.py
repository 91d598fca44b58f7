"""What the broker holds when all is over: the truth that every answer is compared with."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from nats.js.api import StreamInfo

from shared import subjects
from shared.broker import RETRY_DELAY_S, TRANSIENT, Broker

READ_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StoredResult:
    sequence: int
    at: float
    data: bytes


@dataclass(frozen=True)
class Store:
    results: dict[str, list[StoredResult]]
    """For each job what is stored now."""
    ever_stored: int
    """How many results were stored altogether: replaced and removed ones count too."""
    queued: list[str]
    """Ids of jobs that are still in the queue."""


async def read_store(broker: Broker) -> Store:
    held = (await stream_info(broker, subjects.RESULTS)).state
    results = defaultdict(list)
    reading = await broker.js.subscribe(
        subjects.result("*"), stream=subjects.RESULTS, ordered_consumer=True
    )
    for _ in range(held.messages):
        message = await reading.next_msg(READ_TIMEOUT_S)
        metadata = message.metadata
        stored = StoredResult(
            metadata.sequence.stream, metadata.timestamp.timestamp(), message.data
        )
        results[subjects.last_token(message.subject)].append(stored)
    await reading.unsubscribe()
    return Store(dict(results), held.last_seq, await queued(broker))


async def queued(broker: Broker) -> list[str]:
    info = await stream_info(broker, subjects.REQUESTS)
    return [subjects.last_token(subject) for subject in info.state.subjects or {}]


async def stream_info(broker: Broker, stream: str) -> StreamInfo:
    """With its subjects; through elections."""
    while True:
        try:
            return await broker.js.stream_info(stream, subjects_filter=">")
        except TRANSIENT:
            await asyncio.sleep(RETRY_DELAY_S)
