"""What a gateway asks of the broker, where there are many jobs or many inferers."""

import asyncio
import contextvars
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from services.gateway.gateway import Gateway
from services.gateway.jobs.caller import Caller
from services.gateway.settings import GatewaySettings
from shared.broker import streams
from shared.broker.connection import Broker
from shared.broker.consumers import read_model
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.inferers import InfererEntry
from tests.support.processes import PATIENCE_S, NatsServer

JOBS = 120
INFERERS = 2_000
MOST_CALLS = 5

CALLER = Caller("http")

calls: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("calls", default=None)
"""The subjects of the requests to the broker that the present task makes, and those it starts; but
for the one that reads the whole queue now and then."""


def count_calls(broker: Broker) -> None:
    """Note each request that ``broker`` sends."""
    publish = broker.nc.publish

    async def counted(subject: str, *rest: Any, **named: Any) -> None:
        task = asyncio.current_task()
        in_background = task is not None and task.get_name() == "read the waiting jobs"
        noted = calls.get()
        if noted is not None and subject.startswith("$JS.API.") and not in_background:
            noted.append(subject)
        await publish(subject, *rest, **named)

    vars(broker.nc)["publish"] = counted  # a request publishes, too


def _is_ready(gateway: Gateway) -> bool:
    try:
        gateway.require_ready()
    except BrokerUnavailable:
        return False
    return True


@asynccontextmanager
async def running_gateway(url: str) -> AsyncIterator[Gateway]:
    """A gateway without its edges, ready to serve."""
    gateway = Gateway(GatewaySettings(models="tiny"), BrokerSettings(url=url))
    async with gateway.running(lambda: None):
        async with asyncio.timeout(PATIENCE_S):
            while not _is_ready(gateway):
                await asyncio.sleep(0.01)
        count_calls(gateway.broker)
        yield gateway


@pytest.mark.parametrize("knows_the_queue", [True, False])
async def test_the_status_of_a_waiting_job_costs_five_reads_at_most(
    queue: Broker, nats_server: NatsServer, knows_the_queue: bool
) -> None:
    """And gives its position, to a gateway that has followed the queue, and to one that has
    started since."""
    async with running_gateway(nats_server.url) as first:
        submission = JobSubmission(model="tiny", prompt="hi")
        accepted_jobs = [await first.jobs.submit(submission, CALLER) for _ in range(JOBS)]
        if knows_the_queue:
            await _check_positions(first, [accepted.id for accepted in accepted_jobs])
    if not knows_the_queue:
        async with running_gateway(nats_server.url) as second:
            await _check_positions(second, [accepted.id for accepted in accepted_jobs])


async def _check_positions(gateway: Gateway, job_ids: list[str]) -> None:
    for position in (0, 1, 40, JOBS - 1):
        noted: list[str] = []
        calls.set(noted)
        status = await gateway.jobs.status(job_ids[position])
        calls.set(None)
        assert (status.state, status.position) == ("PENDING", position)
        assert len(noted) <= MOST_CALLS, noted


async def test_positions_follow_cancels(queue: Broker, nats_server: NatsServer) -> None:
    """Whatever leaves the queue without having run is not counted."""
    async with running_gateway(nats_server.url) as gateway:
        submission = JobSubmission(model="tiny", prompt="hi")
        accepted_jobs = [await gateway.jobs.submit(submission, CALLER) for _ in range(10)]
        for accepted in accepted_jobs[2:5]:
            await gateway.jobs.cancel(accepted.id)
        assert (await gateway.jobs.status(accepted_jobs[9].id)).position == 6


async def test_thousands_of_inferers_are_counted(
    queue: Broker, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway serves, and the limit is that of all their slots."""
    # Entries that stay, however slow this machine is.
    monkeypatch.setattr(streams, "PRESENCE_TTL", timedelta(hours=1))
    await ensure_topology(queue, Topology(), ["tiny"])
    started_at = timestamp(queue.now())
    publishing = [
        queue.publish_stored(
            subjects.inferer("tiny", f"i-{number}"),
            encode(
                InfererEntry(
                    id=f"i-{number}",
                    model="tiny",
                    slots=1,
                    host=f"host-{number % 100}",
                    threads=1,
                    n_ctx=512,
                    tasks=["complete"],
                    started_at=started_at,
                    version="1",
                    cpus=[number % 64],
                )
            ),
            {},
            60,
        )
        for number in range(INFERERS)
    ]
    await asyncio.gather(*publishing)
    async with running_gateway(nats_server.url) as gateway, asyncio.timeout(PATIENCE_S):
        while True:
            model = await read_model(queue, "tiny")
            if model is not None and model.limit == INFERERS:
                break
            await asyncio.sleep(0.1)
        assert len((await gateway.fleet.report()).inferers) == INFERERS


async def test_a_refresh_that_fails_in_some_new_way_does_not_end_the_gateway(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it found would still be there at the next start."""

    async def fail() -> None:
        raise RuntimeError("something nobody expected")

    async with running_gateway(nats_server.url) as gateway:
        monkeypatch.setattr(gateway.fleet, "refresh", fail)
        for _ in range(2):
            await gateway._refresh()
        assert gateway.fatal is None
        assert _is_ready(gateway)
