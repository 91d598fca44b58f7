"""Examines the broker's storage: whether it can be written, and how full it is."""

from cli.doctor.finding import Finding, error, ok, warning
from shared.broker.connection import Broker
from shared.broker.storage import SHORT_SHARE, read_storage, read_write_errors

ABOUT = "storage"
MIB = 1024**2


async def examine_writability(broker: Broker, replicas: int) -> list[Finding]:
    """Streams that cannot be written; empty if there are none.

    Raises:
        BrokerUnavailable: no answer.
    """
    errors = await read_write_errors(broker, replicas)
    return [
        error(
            ABOUT,
            f"{', '.join(stream for stream, why in errors.items() if why == reason)} cannot be "
            f"written any more: {reason}",
            "free space on the broker's disk, then restart nats-server, which does not try again "
            "by itself (sluice up restarts its own)",
        )
        for reason in sorted(set(errors.values()))
    ]


async def examine_use(broker: Broker) -> Finding:
    """Raises: BrokerUnavailable: no answer."""
    use = await read_storage(broker)
    if use.limit is None:
        return warning(
            ABOUT,
            f"{use.used / MIB:.0f} MiB used, and no limit: a full store refuses results as well "
            "as jobs, and then no job can leave the queue",
            "set one for the account, as deploy/nats/nats.conf does",
        )
    found = f"{use.share:.0%} of {use.limit / MIB:.0f} MiB used"
    if use.is_short:
        return error(
            ABOUT,
            f"{found}; above {SHORT_SHARE:.0%} new jobs are refused with 503 (storage_short)",
            "see what fills it: nats stream report. Results are deleted after 48 h; more inferers "
            "shorten the queue; or raise the limit (SLUICE_STORE) and restart nats-server",
        )
    return ok(ABOUT, found)
