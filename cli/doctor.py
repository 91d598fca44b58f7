"""``sluice doctor``: the questions of somebody whose jobs are stuck, one after another."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import combinations
from typing import Literal

import httpx
from msgspec import Struct

from shared import subjects
from shared.broker import Broker, connected, unavailable_on_outage
from shared.config import BrokerSettings
from shared.consumers import ModelConsumers, read_models
from shared.errors import BrokerUnavailable
from shared.fleet import OVERLAP_ADVICE, Live, overlaps, read_inferers
from shared.timestamps import milliseconds_between, timestamp
from shared.topology import Topology, missing_or_different

CONNECT_TIMEOUT_S = 3.0
SILENT_S = 4.0
"""An inferer speaks every second; one that says nothing for so long is stopped or cut off."""
SAMPLE_S = 3.0
"""A job that has no new token after so long is worth a look."""

Verdict = Literal["ok", "look", "wrong"]


class Finding(Struct, frozen=True, kw_only=True):
    """One question, what was found, and what to do about it."""

    about: str
    verdict: Verdict
    found: str
    advice: str | None = None


async def examine(settings: BrokerSettings, gateway_url: str, replicas: int) -> list[Finding]:
    """Every finding, in the order in which causes are looked for."""
    findings = [await _gateway(gateway_url)]
    try:
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                broker = await stack.enter_async_context(connected(settings, "sluice doctor"))
            findings.append(_ok("broker", f"answers at {settings.url}"))
            findings += await _behind_the_broker(broker, Topology(replicas=replicas))
    except (TimeoutError, BrokerUnavailable) as error:
        findings.append(
            _wrong(
                "broker",
                f"no answer at {settings.url}" + (f": {error}" if str(error) else ""),
                "start it (sluice up), or name another with --nats-url",
            )
        )
    return findings


async def _gateway(url: str) -> Finding:
    try:
        async with httpx.AsyncClient(timeout=CONNECT_TIMEOUT_S) as client:
            status = (await client.get(f"{url}/readyz")).status_code
    except httpx.HTTPError:
        return _wrong(
            "gateway",
            f"no answer at {url}",
            "start one (sluice up, or python -m services.gateway), or name another with --url",
        )
    if status != 200:
        return _wrong("gateway", f"not ready at {url}", "its log says what it waits for")
    return _ok("gateway", f"ready at {url}")


async def _behind_the_broker(broker: Broker, topology: Topology) -> list[Finding]:
    differences = await missing_or_different(broker, topology)
    if any(difference.endswith("missing") for difference in differences):
        return [_wrong("streams", told, "run: sluice topology apply") for told in differences]
    findings = [_wrong("streams", told, "run: sluice topology apply") for told in differences] or [
        _ok("streams", "as they should be")
    ]
    before, _ = await read_inferers(broker)
    await asyncio.sleep(SAMPLE_S)
    live, _ = await read_inferers(broker)
    models = await read_models(broker)
    if not models:
        findings.append(_wrong("models", "none is known", "start an inferer: sluice up"))
    for model, consumers in sorted(models.items()):
        findings += _model(model, consumers, [one for one in live if one.entry.model == model])
    findings += _hung(before, live)
    findings += _overlaps(live)
    versions = sorted({one.entry.version for one in live})
    if len(versions) > 1:
        findings.append(
            _look("versions", f"inferers of {', '.join(versions)}", "finish the update")
        )
    findings.append(await _dead_letters(broker))
    return findings


def _model(model: str, consumers: ModelConsumers, live: list[Live]) -> Iterator[Finding]:
    out, limit = consumers.in_flight, consumers.limit
    slots = sum(one.entry.slots for one in live)
    queue = f"{consumers.waiting} waiting, {out} in flight, limit {limit}"
    if not live:
        yield _wrong(
            model,
            f"no live inferer; {queue}",
            f"start one that serves {model}: sluice up --model …, or INFERER_ALIAS={model} "
            "INFERER_MODEL=… python -m services.inferer",
        )
        return
    yield _ok(model, f"{len(live)} live inferers with {slots} slots; {queue}")
    if limit < slots:
        yield _wrong(
            model,
            f"the limit is {limit}, the live slots are {slots}",
            "a gateway raises it within seconds: is one running?",
        )
    spoken_of = [job for one in live for job in one.entry.jobs]
    if spoken_of:
        since = min(job.started_at for job in spoken_of)
        seconds = milliseconds_between(since, timestamp()) / 1000
        yield _ok(model, f"the longest-running job started {seconds:.0f} s ago")
    if out > len(spoken_of) + slots:
        yield _look(
            model,
            f"{out} jobs are out, the live inferers speak of {len(spoken_of)}",
            "those of a dead inferer come back when its lease ends, after 12 s at most (30 s on a "
            "cluster)",
        )
    if consumers.redelivered:
        yield _look(
            model,
            f"{consumers.redelivered} jobs were delivered more than once",
            "an inferer died or stopped in the middle: see the inferers' logs",
        )


def _hung(before: list[Live], now: list[Live]) -> Iterator[Finding]:
    tokens = {job.id: job.completion_tokens for one in before for job in one.entry.jobs}
    for one in now:
        name = f"inferer {one.entry.id}"
        if one.silent_s > SILENT_S:
            yield _wrong(
                name,
                f"has said nothing for {one.silent_s:.0f} s",
                "it is stopped, hung or cut off: end its process, and its job goes to another",
            )
            continue
        for job in one.entry.jobs:
            if tokens.get(job.id) == job.completion_tokens:
                yield _look(
                    name,
                    f"no new token of {job.id} for {SAMPLE_S:.0f} s, {job.completion_tokens} yet",
                    "a long prompt takes its time; if it stays so, end the process: the job goes "
                    "to another",
                )


def _overlaps(live: list[Live]) -> Iterator[Finding]:
    for first, second in combinations([one.entry for one in live], 2):
        if overlaps(first, second):
            both = set(first.cpus) | set(second.cpus)
            yield _wrong(
                "CPUs",
                f"{first.id} and {second.id} on {first.host} share CPUs: {first.threads} and "
                f"{second.threads} threads on {len(both)}",
                OVERLAP_ADVICE,
            )


async def _dead_letters(broker: Broker) -> Finding:
    with unavailable_on_outage(broker):
        count = (await broker.js.stream_info(subjects.DEAD)).state.messages
    if count:
        return _look("dead letters", f"{count}", f"see why: nats stream view {subjects.DEAD}")
    return _ok("dead letters", "none")


def _ok(about: str, found: str) -> Finding:
    return Finding(about=about, verdict="ok", found=found)


def _look(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, verdict="look", found=found, advice=advice)


def _wrong(about: str, found: str, advice: str) -> Finding:
    return Finding(about=about, verdict="wrong", found=found, advice=advice)
