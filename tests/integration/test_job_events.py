"""Readings of a job's events, as the broker sees them."""

import asyncio
from pathlib import Path

import pytest

from services.gateway.jobs.events import _events_until_outage
from shared.broker.connection import Broker, connected
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.job_ids import new_job_id
from shared.wire import subjects
from shared.wire.results import Result
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, NatsServer, eventually


async def test_a_consumer_whose_creation_was_not_answered_is_deleted(
    broker: Broker, nats_server: NatsServer
) -> None:
    """The broker hangs and creates it when it recovers; nobody reads from it by then."""
    await ensure_topology(broker, Topology(), [])

    async def unfinished() -> Result:
        await asyncio.Event().wait()
        raise AssertionError

    finished = asyncio.create_task(unfinished())
    async with connected(BrokerSettings(url=nats_server.url), "observer") as observer:
        created = await observer.nc.subscribe(
            f"$JS.EVENT.ADVISORY.CONSUMER.CREATED.{subjects.EVENTS}.*"
        )
        deletions = await observer.nc.subscribe(f"$JS.API.CONSUMER.DELETE.{subjects.EVENTS}.*")
        await flush(observer.nc)
        nats_server.process.freeze()
        eventually(lambda: _is_stopped(nats_server.process.pid), "it is frozen")
        with pytest.raises(BrokerUnavailable):
            await anext(_events_until_outage(broker, "tiny", new_job_id(), finished))
        nats_server.process.thaw()
        name = subjects.model_and_id((await created.next_msg(PATIENCE_S)).subject)[1]
        deletion = await deletions.next_msg(PATIENCE_S)
        assert subjects.model_and_id(deletion.subject)[1] == name
        async with asyncio.timeout(PATIENCE_S):
            while (await broker.js.stream_info(subjects.EVENTS)).state.consumer_count:
                await asyncio.sleep(0.01)
    finished.cancel()


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
