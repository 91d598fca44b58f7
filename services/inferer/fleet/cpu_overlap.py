"""Other inferers on the same host that compete with this one for its CPUs, as a gateway finds them:
an inferer does not read the entries of others."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from nats.aio.msg import Msg

from shared.broker.connection import Broker
from shared.broker.inferers import OVERLAP_ADVICE
from shared.logs import logger
from shared.wire import subjects
from shared.wire.codecs import decode_overlap_notice
from shared.wire.inferers import InfererEntry, OverlappingInferer

log = logger()


@asynccontextmanager
async def overlaps_logged(
    broker: Broker, describe: Callable[[], InfererEntry]
) -> AsyncIterator[None]:
    """During the block, log each inferer whose CPUs overlap with those that ``describe`` names.

    Once for each, and again if it has gone meanwhile. Enter it before our own entry is stored:
    then no notice is missed.
    """
    own = describe()
    known: set[str] = set()

    async def on_notice(message: Msg) -> None:
        notice = decode_overlap_notice.read(message.data, message.subject)
        if notice is None:
            return
        found = {other.id: other for other in notice.inferers}
        for other_id in found.keys() - known:
            _warn(own, found[other_id])
        known.clear()
        known.update(found)

    notices = await broker.nc.subscribe(subjects.overlap(own.model, own.id), cb=on_notice)
    try:
        yield
    finally:
        await notices.unsubscribe()


def _warn(own: InfererEntry, other: OverlappingInferer) -> None:
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
