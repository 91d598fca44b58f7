"""More inferers, alive and dead, than the broker lists in one answer."""

import asyncio
from datetime import timedelta

import pytest

from cli.doctor.deaths import examine_deaths
from shared.broker.connection import Broker
from shared.broker.inferers import read_inferers
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import InfererDeath
from shared.wire.inferers import InfererEntry

COUNT = 1100
"""The broker finds the last messages of 1,024 subjects at most (413)."""


@pytest.fixture
async def store(broker: Broker) -> Broker:
    await ensure_topology(broker, Topology(), [])
    bucket = f"KV_{subjects.INFERERS}"
    config = (await broker.js.stream_info(bucket)).config
    # Entries that stay, however slow this machine is.
    await broker.js.update_stream(config.evolve(max_age=3600.0))
    return broker


async def test_more_live_inferers_than_one_read_returns_are_found(store: Broker) -> None:
    """All of them, each once, with what it said last."""
    for host in ("earlier", "now"):
        entries = {
            subjects.inferer("tiny", f"i-{n}"): encode(_entry(f"i-{n}", host)) for n in range(COUNT)
        }
        await _publish(store, entries)
    live, some_died = await read_inferers(store)
    assert [one.entry.id for one in live] == sorted(f"i-{n}" for n in range(COUNT))
    assert {one.entry.host for one in live} == {"now"}
    assert not some_died


async def test_more_dead_inferers_than_one_read_returns_are_noticed(store: Broker) -> None:
    """The last death of each."""
    for cause in ("earlier", "now"):
        at = timestamp(store.now() - timedelta(minutes=5))
        deaths = {
            subjects.death("tiny", f"i-{n}"): InfererDeath(
                inferer=f"i-{n}", model="tiny", host="h", at=at, cause=cause, doing=""
            )
            for n in range(COUNT)
        }
        await _publish(store, {subject: encode(death) for subject, death in deaths.items()})
    found = await examine_deaths(store)
    assert len({finding.about for finding in found}) == len(found) == COUNT
    assert all("of now" in finding.found for finding in found)


async def test_a_reading_does_not_wait_for_a_pause_of_the_writers(store: Broker) -> None:
    """Every entry is refreshed each second: of thousands one comes during every page."""
    bucket, ids = f"KV_{subjects.INFERERS}", [f"i-{n}" for n in range(5)]
    await _publish(store, {subjects.inferer("tiny", one): b"first" for one in ids})
    pages = []
    async for page in store.pages(bucket, subjects.INFERERS_WILDCARD, batch=2):
        pages.append([subjects.model_and_id(stored.subject)[1] for stored in page])
        if len(pages) in (1, 3):
            await _publish(store, {subjects.inferer("tiny", "i-0"): b"again"})
    assert pages == [["i-0", "i-1"], ["i-2", "i-3"], ["i-4", "i-0"]]


async def _publish(broker: Broker, messages: dict[str, bytes]) -> None:
    publishing = [broker.publish_stored(*one, {}, 60) for one in messages.items()]
    await asyncio.gather(*publishing)


def _entry(inferer_id: str, host: str) -> InfererEntry:
    return InfererEntry(
        id=inferer_id,
        model="tiny",
        slots=1,
        host=host,
        threads=1,
        n_ctx=1,
        tasks=["complete"],
        started_at=timestamp(),
        version="",
    )
