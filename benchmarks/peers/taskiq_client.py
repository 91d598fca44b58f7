"""taskiq's client, in the environment of the peers.

.venv/peers/bin/python -m benchmarks.peers.taskiq_client
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nats.aio.msg import Msg

from benchmarks.peers.commands import serve
from benchmarks.peers.taskiq_tasks import STORED, broker, nothing

FILL = 100
"""Jobs that are submitted at once."""

waiting: dict[str, asyncio.Future[None]] = {}
"""Of jobs whose result is not stored yet."""


async def latency(jobs: int) -> list[float]:
    """Milliseconds from the submission of a job to its result, one after another."""
    took = []
    for _ in range(jobs):
        started = time.perf_counter()
        await _run()
        took.append(1000 * (time.perf_counter() - started))
    return took


async def burst(jobs: int) -> float:
    """Seconds from the first submission to the last result of ``jobs``."""
    started = time.perf_counter()
    await asyncio.gather(*(_run() for _ in range(jobs)))
    return time.perf_counter() - started


async def submit(jobs: int) -> list[float]:
    """Milliseconds of each submission."""
    took = []
    for _ in range(jobs):
        started = time.perf_counter()
        await nothing.kiq()
        took.append(1000 * (time.perf_counter() - started))
    return took


async def fill(jobs: int) -> None:
    """Queue ``jobs``."""
    for begin in range(0, jobs, FILL):
        await asyncio.gather(*(nothing.kiq() for _ in range(begin, min(begin + FILL, jobs))))


async def observe(jobs: int) -> float:
    """Seconds in which ``jobs`` end, from the end of one."""
    subscription = await broker.client.subscribe(STORED)
    await subscription.next_msg(timeout=None)
    started = time.perf_counter()
    for _ in range(jobs):
        await subscription.next_msg(timeout=None)
    ended = time.perf_counter()
    await subscription.unsubscribe()
    return ended - started


async def _run() -> None:
    job_id = broker.id_generator()
    waiting[job_id] = stored = asyncio.get_running_loop().create_future()
    task = await nothing.kicker().with_task_id(job_id).kiq()
    await stored
    result = await task.get_result()
    result.raise_for_error()


async def _stored(message: Msg) -> None:
    stored = waiting.pop(message.data.decode(), None)
    if stored is not None:
        stored.set_result(None)


async def _start() -> None:
    await broker.startup()
    await broker.client.subscribe(STORED, cb=_stored)


def _on(
    loop: asyncio.AbstractEventLoop, command: Callable[..., Coroutine[Any, Any, Any]]
) -> Callable[..., Any]:
    return lambda **order: asyncio.run_coroutine_threadsafe(command(**order), loop).result()


if __name__ == "__main__":
    # In a thread of its own, so that the broker is answered while the client waits for a command.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    _on(loop, _start)()
    commands = (latency, burst, submit, fill, observe)
    serve({command.__name__: _on(loop, command) for command in commands})
    _on(loop, broker.shutdown)()
