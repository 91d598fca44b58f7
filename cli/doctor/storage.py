"""The broker's storage: whether it can be written, and how full it is."""

from cli.doctor.finding import Finding, look, ok, wrong
from shared.broker import Broker
from shared.storage import SHORT_SHARE, read_storage, read_write_errors

ABOUT = "storage"
MB = 1_000_000


async def examine_storage(broker: Broker, replicas: int) -> list[Finding]:
    """Raises: BrokerUnavailable: no answer."""
    errors = await read_write_errors(broker, replicas)
    findings = [
        wrong(
            ABOUT,
            f"{', '.join(stream for stream, why in errors.items() if why == error)} cannot be "
            f"written any more: {error}",
            "free space on the broker's disk, then restart nats-server, which does not try again "
            "by itself (sluice up restarts its own)",
        )
        for error in sorted(set(errors.values()))
    ]
    use = await read_storage(broker)
    if use.limit is None:
        findings.append(
            look(
                ABOUT,
                f"{use.used / MB:.1f} MB used, and no limit: when it is full, results are refused "
                "as well as jobs, and nothing can leave the queue",
                "give the account one, as deploy/nats/nats.conf does",
            )
        )
        return findings
    told = f"{use.share:.0%} of {use.limit / MB:.0f} MB used"
    if use.is_short:
        findings.append(
            wrong(
                ABOUT,
                f"{told}; above {SHORT_SHARE:.0%} new jobs are refused with 503 (storage_short)",
                "see what fills it (nats stream report): results go after 48 h, a queue when "
                "inferers are added; or raise the limit (SLUICE_STORE) and restart nats-server",
            )
        )
    return findings or [ok(ABOUT, told)]
