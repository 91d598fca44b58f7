"""``sluice doctor``: examines everything that can make jobs slow or stuck."""

import asyncio
from contextlib import AsyncExitStack

from msgspec import Struct

from cli.doctor.consumers import examine_consumers
from cli.doctor.deaths import examine_deaths
from cli.doctor.finding import Finding, error, ok, warning
from cli.doctor.gateway import examine_gateway
from cli.doctor.inferers import computing, hung, overlapping, versions
from cli.doctor.queues import examine_queue
from cli.doctor.storage import examine_use, examine_writability
from shared.broker.connection import Broker, connected, unavailable_on_outage
from shared.broker.consumers import ModelConsumers, oldest_waiting_s, read_models
from shared.broker.inferers import Live, read_inferers
from shared.broker.streams import Topology
from shared.broker.topology import missing_or_different, recreated_streams
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.model_names import token_of
from shared.timestamps import timestamp
from shared.wire import subjects

CONNECT_TIMEOUT_S = 3.0
SAMPLE_S = 3.0
"""A queue that delivers nothing, or a job without a new token, for this long is reported."""


class Snapshot(Struct, frozen=True):
    """Inferers and queues at one moment. ``some_died``: an inferer died a moment ago, so its jobs
    may still be in flight."""

    live: list[Live]
    some_died: bool
    models: dict[str, ModelConsumers]


async def examine(
    settings: BrokerSettings | None, gateway_url: str, replicas: int
) -> list[Finding]:
    """All findings, the most fundamental causes first. Without ``settings`` the broker's address is
    not known, and only the gateway is examined."""
    findings, gateway_version = await examine_gateway(gateway_url)
    if settings is None:
        found = "not examined, because only the address of the gateway was given"
        return [*findings, warning("broker", found, "add --nats-url, or set NATS_URL")]
    try:
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                broker = await stack.enter_async_context(connected(settings, "sluice doctor"))
            findings.append(ok("broker", f"answers at {settings.url}"))
            if unwritable := await examine_writability(broker, replicas):
                # Heartbeats cannot be stored either, so all inferers would look dead.
                return findings + unwritable
            findings.append(await examine_use(broker))
            findings += await _examine_broker(broker, Topology(replicas=replicas), gateway_version)
    except (TimeoutError, BrokerUnavailable) as outage:
        findings.append(
            error(
                "broker",
                f"no answer at {settings.url}" + (f": {outage}" if str(outage) else ""),
                "start it (sluice up), or name another with --nats-url",
            )
        )
    return findings


async def _examine_broker(
    broker: Broker, topology: Topology, gateway_version: str | None
) -> list[Finding]:
    differences = await missing_or_different(broker, topology)
    findings = [
        error("streams", difference, "run: sluice topology apply") for difference in differences
    ]
    if any(difference.endswith("missing") for difference in differences):
        return findings
    before = await _read_snapshot(broker)
    await asyncio.sleep(SAMPLE_S)
    now = await _read_snapshot(broker)
    served = {token_of(one.entry.model) for one in now.live}
    findings = findings or [ok("streams", "complete and configured correctly")]
    findings += [
        warning(
            "streams",
            f"{name} was created at {timestamp(at)}, after the others: older messages are lost",
            "expected after an upgrade; otherwise it was deleted and a gateway created it again "
            "(streams_missing in its log)",
        )
        for name, at in (await recreated_streams(broker, topology)).items()
    ]
    findings += await examine_consumers(broker, topology.ack_wait_s, served)
    if not now.models:
        findings.append(error("models", "no model is known", "start an inferer: sluice up"))
    for token, consumers in sorted(now.models.items()):
        findings += examine_queue(
            before.models.get(token),
            consumers,
            [one for one in now.live if token_of(one.entry.model) == token],
            at=broker.now(),
            oldest_s=await oldest_waiting_s(broker, consumers),
            some_died=now.some_died,
        )
    findings += await examine_deaths(broker)
    findings += hung(before.live, now.live, SAMPLE_S)
    findings += computing(now.live)
    findings += overlapping(now.live)
    findings += versions(gateway_version, now.live)
    findings.append(await _dead_letters(broker))
    return findings


async def _read_snapshot(broker: Broker) -> Snapshot:
    live, some_died = await read_inferers(broker)
    return Snapshot(live, some_died, await read_models(broker))


async def _dead_letters(broker: Broker) -> Finding:
    with unavailable_on_outage(broker):
        count = (await broker.js.stream_info(subjects.DEAD)).state.messages
    if count:
        return warning("dead letters", f"{count}", "see why: sluice dead list")
    return ok("dead letters", "none")
