"""The broker's storage: whether it can be written, and how full it is."""

from cli.doctor.finding import Finding, look, ok, wrong
from shared.broker.connection import Broker
from shared.broker.storage import SHORT_SHARE, read_storage, read_write_errors

ABOUT = "storage"
MIB = 1024**2


async def examine_writing(broker: Broker, replicas: int) -> list[Finding]:
    """Nothing if all is well.

    Raises:
        BrokerUnavailable: no answer.
    """
    errors = await read_write_errors(broker, replicas)
    return [
        wrong(
            ABOUT,
            f"{', '.join(stream for stream, why in errors.items() if why == error)} cannot be "
            f"written any more: {error}",
            "free space on the broker's disk, then restart nats-server, which does not try again "
            "by itself (sluice up restarts its own)",
        )
        for error in sorted(set(errors.values()))
    ]


async def examine_use(broker: Broker) -> Finding:
    """Raises: BrokerUnavailable: no answer."""
    use = await read_storage(broker)
    if use.limit is None:
        return look(
            ABOUT,
            f"{use.used / MIB:.0f} MiB used, and no limit: a store that is full refuses results as "
            "well as jobs, and then nothing can leave the queue",
            "give the account one, as deploy/nats/nats.conf does",
        )
    told = f"{use.share:.0%} of {use.limit / MIB:.0f} MiB used"
    if use.is_short:
        return wrong(
            ABOUT,
            f"{told}; above {SHORT_SHARE:.0%} new jobs are refused with 503 (storage_short)",
            "see what fills it: nats stream report. Results go after 48 h, a queue when inferers "
            "are added; or raise the limit (SLUICE_STORE) and restart nats-server",
        )
    return ok(ABOUT, told)
