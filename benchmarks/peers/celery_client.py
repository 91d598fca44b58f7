"""Celery's client, in the environment of the peers. It waits for results with the subscription of
the Redis backend, which wakes it when one is stored.

    .venv/peers/bin/python -m benchmarks.peers.celery_client
"""

import json
import time
import uuid
from typing import Any

import redis
from celery.result import AsyncResult, ResultSet

from benchmarks.peers.celery_tasks import REDIS, generate, nothing
from benchmarks.peers.commands import serve

PATIENCE_S = 600
FILL = 1_000
"""Messages that are sent to Redis at once."""


def latency(jobs: int) -> list[float]:
    """Milliseconds from the submission of a job to its result, one after another."""
    took = []
    for _ in range(jobs):
        started = time.perf_counter()
        nothing.delay().get(timeout=PATIENCE_S)
        took.append(1000 * (time.perf_counter() - started))
    return took


def burst(jobs: int) -> float:
    """Seconds from the first submission to the last result of ``jobs``."""
    started = time.perf_counter()
    _wait([nothing.delay() for _ in range(jobs)])
    return time.perf_counter() - started


def complete(prompts: list[str], max_tokens: int) -> list[tuple[float, int, int]]:
    """Of each job, in the order in which they ended: the seconds since the first was submitted, the
    tokens of its prompt and those of its answer."""
    started = time.perf_counter()
    ends = _wait([generate.delay(prompt, max_tokens) for prompt in prompts])
    return [
        (
            ended - started,
            answer["usage"]["prompt_tokens"],
            answer["usage"]["completion_tokens"],
        )
        for ended, answer in ends
    ]


def submit(jobs: int) -> list[float]:
    """Milliseconds of each submission."""
    took = []
    for _ in range(jobs):
        started = time.perf_counter()
        nothing.delay()
        took.append(1000 * (time.perf_counter() - started))
    return took


def fill(jobs: int) -> None:
    """Queue ``jobs`` by copies of a message that Celery has sent, while the worker is stopped."""
    nothing.delay()  # Redis may still hand one to a worker that waited when it was stopped
    last = nothing.delay()
    waiting = redis.Redis.from_url(f"{REDIS}/0")
    sent: bytes = waiting.lindex("celery", 0)
    tag = json.loads(sent)["properties"]["delivery_tag"]

    def copy() -> bytes:
        return sent.replace(last.id.encode(), _new_id()).replace(tag.encode(), _new_id())

    for begin in range(2, jobs, FILL):
        waiting.lpush("celery", *(copy() for _ in range(begin, min(begin + FILL, jobs))))


def _new_id() -> bytes:
    return str(uuid.uuid4()).encode()


def observe(jobs: int) -> float:
    """Seconds in which ``jobs`` end, from the end of one."""
    subscription = redis.Redis.from_url(REDIS).pubsub(ignore_subscribe_messages=True)
    subscription.psubscribe("celery-task-meta-*")
    ends = subscription.listen()
    next(ends)
    started = time.perf_counter()
    for _ in range(jobs):
        next(ends)
    ended = time.perf_counter()
    subscription.close()
    return ended - started


def _wait(results: list[AsyncResult]) -> list[tuple[float, Any]]:
    """The end of each job and its result, in the order in which they ended."""
    ends = []
    for _, meta in ResultSet(results).iter_native(timeout=PATIENCE_S):
        ended = time.perf_counter()
        if meta["status"] != "SUCCESS":
            raise RuntimeError(meta)
        ends.append((ended, meta["result"]))
    return ends


if __name__ == "__main__":
    serve(
        {
            "latency": latency,
            "burst": burst,
            "complete": complete,
            "submit": submit,
            "fill": fill,
            "observe": observe,
        }
    )
