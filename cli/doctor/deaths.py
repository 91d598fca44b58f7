"""Examines recent deaths of inferers: the cause, and the jobs that they ran."""

import signal
from datetime import timedelta

from cli.doctor.finding import Finding, warning
from shared.broker.connection import Broker
from shared.process.exit_status import EXIT_STALLED, describe_exit
from shared.timestamps import parse_timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_inferer_death
from shared.wire.events import InfererDeath

RECENT = timedelta(hours=1)

ADVICE = {
    describe_exit(-signal.SIGKILL): "unless someone killed it, memory ran out: lower "
    "INFERER_N_CTX or INFERER_CONCURRENCY, or use a smaller model",
    describe_exit(-signal.SIGILL): "llama.cpp was compiled for another CPU: compile it on this one",
    describe_exit(EXIT_STALLED): "its log shows where it hung; raise "
    "INFERER_STALL_S if it is only slow",
}
ADVICE_WITH_JOBS = (
    "see its log; a job that keeps killing inferers ends as worker_lost: sluice dead list"
)
ADVICE_WITHOUT_JOBS = "see its log"


async def examine_deaths(broker: Broker) -> list[Finding]:
    """The last death of each inferer that died within the last hour."""
    findings = []
    for stored in await broker.last_of_each(subjects.STATES, subjects.DEATHS_WILDCARD):
        try:
            death = decode_inferer_death(stored.data)
            is_recent = parse_timestamp(death.at) > broker.now() - RECENT
        except (ValueError, RecursionError):
            continue  # not published by an inferer
        if is_recent:
            findings.append(_finding(death))
    return findings


def _finding(death: InfererDeath) -> Finding:
    return warning(
        f"inferer {death.inferer}",
        f"died at {death.at} of {death.cause}, {death.doing}",
        ADVICE.get(death.cause, ADVICE_WITH_JOBS if death.jobs else ADVICE_WITHOUT_JOBS),
    )
