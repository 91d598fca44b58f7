"""``sluice doctor``: the questions of somebody whose jobs are stuck, one after another."""

import asyncio
from contextlib import AsyncExitStack

from msgspec import Struct

from cli.doctor.consumers import examine_consumers
from cli.doctor.deaths import examine_deaths
from cli.doctor.finding import Finding, look, ok, wrong
from cli.doctor.gateway import examine_gateway
from cli.doctor.inferers import computing, hung, overlapping, versions
from cli.doctor.queues import examine_queue
from cli.doctor.storage import examine_use, examine_writing
from shared.broker.connection import Broker, connected, unavailable_on_outage
from shared.broker.consumers import ModelConsumers, oldest_waiting_s, read_models
from shared.broker.inferers import Live, read_inferers
from shared.broker.topology import Topology, missing_or_different, recreated_streams
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.model_names import token_of
from shared.timestamps import timestamp
from shared.wire import subjects

CONNECT_TIMEOUT_S = 3.0
SAMPLE_S = 3.0
"""A queue that gives out nothing, and a job that has no new token, for so long is worth a look."""


class Sight(Struct, frozen=True):
    """Inferers and queues at one moment; ``some_died``: of late, and their jobs may be out yet."""

    live: list[Live]
    some_died: bool
    models: dict[str, ModelConsumers]


async def examine(settings: BrokerSettings, gateway_url: str, replicas: int) -> list[Finding]:
    """Every finding, in the order in which causes are looked for."""
    findings, gateway_version = await examine_gateway(gateway_url)
    try:
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                broker = await stack.enter_async_context(connected(settings, "sluice doctor"))
            findings.append(ok("broker", f"answers at {settings.url}"))
            if unwritable := await examine_writing(broker, replicas):
                # Nobody can say anything through it either: all else would look dead.
                return findings + unwritable
            findings.append(await examine_use(broker))
            findings += await _behind_the_broker(
                broker, Topology(replicas=replicas), gateway_version
            )
    except (TimeoutError, BrokerUnavailable) as error:
        findings.append(
            wrong(
                "broker",
                f"no answer at {settings.url}" + (f": {error}" if str(error) else ""),
                "start it (sluice up), or name another with --nats-url",
            )
        )
    return findings


async def _behind_the_broker(
    broker: Broker, topology: Topology, gateway_version: str | None
) -> list[Finding]:
    differences = await missing_or_different(broker, topology)
    findings = [wrong("streams", told, "run: sluice topology apply") for told in differences]
    if any(difference.endswith("missing") for difference in differences):
        return findings
    before = await _look_around(broker)
    await asyncio.sleep(SAMPLE_S)
    now = await _look_around(broker)
    served = {token_of(one.entry.model) for one in now.live}
    findings = findings or [ok("streams", "as they should be")]
    findings += [
        look(
            "streams",
            f"{name} was created at {timestamp(at)}, after the others: what it held before is gone",
            "expected after an upgrade; otherwise it was deleted, and a gateway created it again "
            "(streams_missing in its log)",
        )
        for name, at in (await recreated_streams(broker, topology)).items()
    ]
    findings += await examine_consumers(broker, topology.ack_wait_s, served)
    if not now.models:
        findings.append(wrong("models", "no model is known", "start an inferer: sluice up"))
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


async def _look_around(broker: Broker) -> Sight:
    live, some_died = await read_inferers(broker)
    return Sight(live, some_died, await read_models(broker))


async def _dead_letters(broker: Broker) -> Finding:
    with unavailable_on_outage(broker):
        count = (await broker.js.stream_info(subjects.DEAD)).state.messages
    if count:
        return look("dead letters", f"{count}", "see why: sluice dead list")
    return ok("dead letters", "none")
