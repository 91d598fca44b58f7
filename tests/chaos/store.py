"""What the broker holds when all is over: the truth that every answer is compared with."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.js.api import StreamInfo

from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.refusals import TRANSIENT
from shared.wire import subjects
from shared.wire.codecs import decode_dead_letter
from shared.wire.results import DeadLetter

READ_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StoredResult:
    sequence: int
    at: float
    subject: str
    data: bytes


@dataclass(frozen=True)
class Store:
    results: dict[str, list[StoredResult]]
    """For each job what is stored now."""
    ever_stored: int
    """How many results were stored altogether: replaced and removed ones count too."""
    queued: list[str]
    """Ids of jobs that are still in the queue."""
    letters: dict[str, DeadLetter]
    """Dead letters by the ids of their jobs."""


async def read_store(broker: Broker) -> Store:
    results = defaultdict(list)
    for message in await _all(broker, subjects.RESULTS, subjects.RESULTS_WILDCARD):
        metadata = message.metadata
        stored = StoredResult(
            metadata.sequence.stream,
            metadata.timestamp.timestamp(),
            message.subject,
            message.data,
        )
        results[subjects.model_and_id(message.subject)[1]].append(stored)
    letters = {}
    for message in await _all(broker, subjects.DEAD, subjects.DEAD_WILDCARD):
        with suppress(ValueError, RecursionError):  # rubbish that a fault has sent
            letters[subjects.model_and_id(message.subject)[1]] = decode_dead_letter(message.data)
    ever_stored = (await stream_info(broker, subjects.RESULTS)).state.last_seq
    return Store(dict(results), ever_stored, await queued(broker), letters)


async def _all(broker: Broker, stream: str, subject: str) -> list[Msg]:
    held = (await stream_info(broker, stream)).state.messages
    reading = await broker.js.subscribe(subject, stream=stream, ordered_consumer=True)
    messages = [await reading.next_msg(READ_TIMEOUT_S) for _ in range(held)]
    await reading.unsubscribe()
    return messages


async def queued(broker: Broker) -> list[str]:
    info = await stream_info(broker, subjects.REQUESTS)
    return [subjects.model_and_id(subject)[1] for subject in info.state.subjects or {}]


async def stream_info(broker: Broker, stream: str) -> StreamInfo:
    """With its subjects; through elections."""
    while True:
        try:
            return await broker.js.stream_info(stream, subjects_filter=">")
        except TRANSIENT:
            await asyncio.sleep(RETRY_DELAY_S)
