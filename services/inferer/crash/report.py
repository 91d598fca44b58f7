"""The report of an inferer that died: an event for each job that it ran, an entry for
``sluice doctor``, a line in the log."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

import nats.errors
from msgspec.structs import replace

from services.inferer.crash.flight_recorder import DOING, FlightRecorder, Running
from shared.broker.connection import Broker
from shared.config import BrokerSettings, load
from shared.errors import SluiceError, StoredAlready
from shared.logs import configure_logs, drain_logs, logger
from shared.process.exit_status import describe_exit
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_state_event, encode
from shared.wire.events import InfererDeath, StateEvent
from shared.wire.trace import trace_of

PATIENCE_S = 5.0
"""How long the broker may take to store the report. The parent process ends only after it."""

log = logger()


def report(recorder: FlightRecorder, status: int) -> None:
    """Log and publish how the inferer behind ``recorder`` died; ``status`` is its return code, as
    `subprocess` gives it."""
    known = recorder.description()
    running = recorder.running()
    death = InfererDeath(
        inferer=known.get("inferer", ""),
        model=known.get("model", ""),
        host=socket.gethostname(),
        at=timestamp(),
        cause=describe_exit(status),
        doing="; ".join(f"{DOING[job.phase]} (job {job.id})" for job in running)
        or known.get("stage", "starting"),
        jobs=[job.id for job in running],
    )
    configure_logs("inferer", inferer=death.inferer)
    log.error(
        "inferer_died",
        cause=death.cause,
        doing=death.doing,
        job_ids=death.jobs,
        model=death.model,
    )
    if death.inferer:  # empty if it died before it had read its settings
        try:
            asyncio.run(asyncio.wait_for(_publish(death, running), PATIENCE_S))
        except (TimeoutError, OSError, SluiceError, nats.errors.Error) as error:
            log.warning("crash_report_not_published", error=str(error) or type(error).__name__)
    drain_logs()  # this process may die of the same signal


async def _publish(death: InfererDeath, running: Sequence[Running]) -> None:
    broker = Broker(load(BrokerSettings, "NATS"), f"crash report of {death.inferer}")
    await broker.connect()
    death = replace(death, at=timestamp(broker.now()))
    try:
        await asyncio.gather(*(_publish_end(broker, death, job, running) for job in running))
        await broker.publish_stored(
            subjects.death(death.model, death.inferer), encode(death), {}, PATIENCE_S
        )
    finally:
        await broker.close()


async def _publish_end(
    broker: Broker, death: InfererDeath, job: Running, running: Sequence[Running]
) -> None:
    """Say of ``job`` that this attempt is over: its start once more, with the cause."""
    subject = subjects.state(death.model, job.id)
    last = await broker.subject_get(subjects.STATES, subject)
    started = None
    if last is not None:
        started = decode_state_event.read(last.data, subject)
        if started is None or not _is_this_attempt(started, job, death.inferer):
            return  # it runs elsewhere by now, or has ended
    event = StateEvent(
        state="started",
        attempt=job.attempt,
        at=started.at if started else death.at,
        inferer=death.inferer,
        work=started.work if started else None,
        code="worker_lost",
        message=f"{death.cause} while {DOING[job.phase]}, {_company(job, running)}",
    )
    trace = trace_of(last.headers) if last else {}
    # If two write at the same moment, the broker keeps the first: another attempt may begin.
    headers = {**trace, subjects.HEADER_EXPECTED_LAST: str(last.sequence if last else 0)}
    with suppress(StoredAlready):
        await broker.publish_stored(subject, encode(event), headers, PATIENCE_S)
        events = subjects.state_events(death.model, job.id)
        await broker.publish_stored(events, encode(event), trace, PATIENCE_S)


def _is_this_attempt(event: StateEvent, job: Running, inferer: str) -> bool:
    return (event.state, event.attempt, event.inferer, event.code) == (
        "started",
        job.attempt,
        inferer,
        None,
    )


def _company(job: Running, running: Sequence[Running]) -> str:
    others = [f"{other.id} ({DOING[other.phase]})" for other in running if other.id != job.id]
    if others:
        return f"together with job {', '.join(others)}"
    return "running alone"
