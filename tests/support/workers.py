"""The worker in the test's own process, and what the broker then holds of its jobs."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from services.gateway.jobs.retries import Retries
from services.inferer.crash.flight_recorder import FlightRecorder
from services.inferer.engine.set_up import AnyEngine
from services.inferer.worker.worker import Worker
from shared.broker.connection import Broker
from shared.broker.results import read_result
from shared.config import StartConcurrency
from shared.errors import SluiceError
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.codecs import decode_dead_letter, decode_state_event, encode
from shared.wire.requests import InferenceRequest, RetryRequest
from shared.wire.results import DeadLetter, Result


@asynccontextmanager
async def working(
    broker: Broker,
    engine: AnyEngine,
    name: str = "first",
    *,
    concurrency: StartConcurrency = 1,
    grace_s: float = 10,
    max_attempts: int = 3,
    retry_s: float = 0.1,
) -> AsyncIterator[tuple[Worker, asyncio.Event]]:
    """A worker, stopped by its event or at the end of the block; if it fails, so does the block."""
    worker = Worker(
        broker,
        engine,
        recorder=FlightRecorder(),
        inferer_id=name,
        model="tiny",
        concurrency=concurrency,
        priority=0,
        max_attempts=max_attempts,
        retry_s=retry_s,
        grace_s=grace_s,
    )
    stopping, ready = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.run(stopping, ready.set))
        await ready.wait()
        yield worker, stopping
        stopping.set()


@asynccontextmanager
async def scheduling_retries(broker: Broker) -> AsyncIterator[None]:
    """What a gateway does for an inferer whose job failed, during the block."""
    retries = Retries(broker)

    async def schedule(message: Msg) -> None:
        model, job_id = subjects.model_and_id(message.subject)
        headers, answer = {}, b""
        try:
            wanted = msgspec.json.decode(message.data, type=RetryRequest)
            answer = encode(await retries.schedule(model, job_id, wanted))
        except SluiceError as error:
            headers = {ERROR_HEADER: f"{error.code}: {error.message}", ERROR_CODE_HEADER: "503"}
        await broker.nc.publish(message.reply, answer, headers=headers)

    serving = await broker.nc.subscribe(subjects.RETRY_WILDCARD, cb=schedule)
    try:
        yield
    finally:
        await serving.unsubscribe()


async def put(broker: Broker, body: InferenceRequest | bytes, **headers: str) -> str:
    """Put a job on the queue; its id."""
    job_id = new_job_id()
    payload = body if isinstance(body, bytes) else encode(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    await broker.publish_stored(subjects.request("tiny", job_id), payload, named, 5)
    return job_id


async def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of the coroutine function ``condition``."""
    give_up_at = time.monotonic() + 60
    while not (value := await condition()):
        assert time.monotonic() < give_up_at, f"not in time: {what}"
        await asyncio.sleep(0.005)
    return value


async def ended(broker: Broker, job_id: str) -> Result:
    result: Result = await until(lambda: read_result(broker, "tiny", job_id), "a result")
    return result


async def states(broker: Broker, job_id: str) -> list[tuple[str, int, str]]:
    """The job's state events: what, which attempt, which inferer."""
    found: list[tuple[str, int, str]] = []
    sequence = 0
    query = {"next_by_subj": subjects.state_events("tiny", job_id)}
    while stored := await broker.direct_get("EVENTS", seq=sequence + 1, **query):
        event, sequence = decode_state_event(stored.data), stored.sequence
        found.append((event.state, event.attempt, event.inferer))
    return found


async def queue_is_empty(broker: Broker) -> None:
    async def check() -> bool:
        return (await broker.js.stream_info("REQUESTS")).state.messages == 0

    await until(check, "an empty queue")


async def dead_letter(broker: Broker, job_id: str) -> DeadLetter:
    stored = await broker.direct_get("DEAD", last_by_subj=subjects.dead("tiny", job_id))
    assert stored is not None
    return decode_dead_letter(stored.data)
