"""Other inferers on the same host that compete with this one for its CPUs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shared.background import keep_running
from shared.broker.connection import Broker
from shared.broker.inferers import OVERLAP_ADVICE, overlaps, read_inferers
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.wire.inferers import InfererEntry

LOOK_S = 5.0

log = logger()


@asynccontextmanager
async def neighbours_watched(
    broker: Broker, describe: Callable[[], InfererEntry]
) -> AsyncIterator[None]:
    """During the block, log each inferer whose CPUs overlap with those that ``describe`` names.

    Once for each, and again if it has gone meanwhile. Enter it once our own entry is stored: of
    two that start at one moment, one at least then finds the other at its first look.
    """
    watching = keep_running(lambda: _watch(broker, describe), "watch neighbours")
    try:
        yield
    finally:
        watching.cancel()


async def _watch(broker: Broker, describe: Callable[[], InfererEntry]) -> None:
    known: set[str] = set()
    while True:
        try:
            live, _ = await read_inferers(broker)
        except BrokerUnavailable:
            pass
        else:
            own = describe()
            found = {one.entry.id: one.entry for one in live if overlaps(own, one.entry)}
            for other_id in found.keys() - known:
                _warn(own, found[other_id])
            known = set(found)
        await asyncio.sleep(LOOK_S)


def _warn(own: InfererEntry, other: InfererEntry) -> None:
    log.warning(
        "cpus_overlap",
        host=own.host,
        threads=own.threads,
        cpus=own.cpus,
        other=other.id,
        other_threads=other.threads,
        other_cpus=other.cpus,
        hint=OVERLAP_ADVICE,
    )
