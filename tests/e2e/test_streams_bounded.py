"""Bounds that somebody sets on our streams while everything runs are taken off again."""

import asyncio
from collections.abc import Awaitable, Callable

from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings
from tests.support.processes import Stack, eventually

STREAMS = ("REQUESTS", "RESULTS", "EVENTS", "DEAD", "KV_INFERERS", "KV_IDEMPOTENCY")


def test_bounds_on_streams_are_removed_and_jobs_go_on(stack: Stack) -> None:
    """Nothing ends; the job that runs meanwhile and those that come later get their results."""
    job_id = stack.submit(prompt="long", max_tokens=800)
    stack.wait_for_state(job_id, "STARTED")
    asyncio.run(_on_the_broker(stack, _bound))
    eventually(lambda: asyncio.run(_on_the_broker(stack, _is_free)), "the bounds are gone")
    assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
    stack.wait_until_served("tiny")
    assert stack.wait_for_end(stack.submit(prompt="hi", max_tokens=2))["state"] == "SUCCESS"
    changes = [line["change"] for line in stack.gateways[0].events("topology_changed")]
    for stream in STREAMS:
        assert f"stream {stream}: max_msg_size is 1, should be -1" in changes
    for process in (*stack.gateways, *stack.inferers):
        assert process.popen.poll() is None
        assert "Traceback" not in process.output()
    assert not stack.inferers[0].events("inferer_died")


async def _on_the_broker(stack: Stack, work: Callable[[Broker], Awaitable[bool]]) -> bool:
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        return await work(broker)


async def _bound(broker: Broker) -> bool:
    for stream in STREAMS:
        config = (await broker.js.stream_info(stream)).config
        await broker.js.update_stream(config.evolve(max_msg_size=1))
    return True


async def _is_free(broker: Broker) -> bool:
    infos = [await broker.js.stream_info(stream) for stream in STREAMS]
    return all(info.config.max_msg_size == -1 for info in infos)
