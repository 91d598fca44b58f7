"""Estimates for clients: a job's position, progress and ETA, and when a full queue has room."""

import math
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

import numpy
from msgspec import Struct
from msgspec.structs import asdict, replace
from nats.aio.msg import Msg

from services.gateway.eta.lengths import Floats
from services.gateway.eta.position import (
    QueuePosition,
    find_position,
    higher_than,
    read_next_requests,
)
from services.gateway.eta.running_jobs import RunningAttempt, RunningJobs
from services.gateway.eta.service_time import ServiceTime
from services.gateway.eta.simulation import DRAWS, Simulation, Slot
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import PendingJob
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.broker.results import decode_stored
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.model_names import token_of
from shared.retention import MAX_JOB_LIFETIME
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import Eta, JobStatus, Progress
from shared.wire.codecs import decode_request, decode_state_event
from shared.wire.inferers import InfererEntry
from shared.wire.requests import TEXT_TASKS, InferenceRequest, Work
from shared.wire.results import Completed, Result

MAX_STORED_SAMPLES = 300
"""How many stored results a gateway reads when it starts."""
MAX_STORED_SAMPLE_BYTES = 8 * 1024 * 1024
QUIET_S = 2.0
RETRY_AFTER_UNMEASURED_S = 5
RETRY_AFTER_UNSERVED_S = 30
"""``Retry-After`` while nothing has been measured, and while no inferer serves the model."""

FIRST_SLOT = numpy.zeros(DRAWS, dtype=int)

log = logger()


class Estimate(Struct, frozen=True):
    """None stands for what is not known or does not apply."""

    position: int | None = None
    progress: Progress | None = None
    eta: Eta | None = None

    def added_to(self, status: JobStatus) -> JobStatus:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(status, **known)


class Forecast:
    """Estimates from measurements of one gateway's lifetime; a restart reads the latest results."""

    def __init__(self, broker: Broker, fleet: Fleet, waiting_jobs: WaitingJobs) -> None:
        self._broker = broker
        self._fleet = fleet
        self._waiting_jobs = waiting_jobs
        self._running = RunningJobs()
        self._service_times: dict[str, ServiceTime] = {}
        fleet.on_refresh(waiting_jobs.on_queues_read)
        waiting_jobs.on_accepted(fleet.on_accepted)

    async def start(self) -> None:
        """Read the stored results, and subscribe to the events of jobs that start and end."""
        await self._broker.nc.subscribe(subjects.STATES_WILDCARD, cb=self._on_state_event)
        try:
            await self._read_stored_results()
        except BrokerUnavailable as error:
            log.warning("stored_results_not_read", error=error.message)

    async def _read_stored_results(self) -> None:
        everything = subjects.RESULTS_WILDCARD
        newest = await self._broker.direct_get(subjects.RESULTS, last_by_subj=everything)
        if newest is None:
            return
        for stored in await self._broker.direct_get_all(
            subjects.RESULTS,
            seq=max(1, newest.sequence - MAX_STORED_SAMPLES),
            next_by_subj=everything,
            batch=MAX_STORED_SAMPLES + 1,
            max_bytes=MAX_STORED_SAMPLE_BYTES,
        ):
            self.observe(decode_stored(stored.subject, stored.data, self._broker.now()))

    def observe(self, result: Result) -> None:
        """Add a result to the measurements."""
        self._running.on_result(result.id)
        model = token_of(result.model)
        self._waiting_jobs.on_end(model, result.id)
        if isinstance(result, Completed):
            with suppress(ValueError):  # published by something other than an inferer
                self._service_times.setdefault(model, ServiceTime()).observe(result)

    async def estimate(self, job: PendingJob, model: ModelConsumers | None) -> Estimate:
        """The estimate for a job that waits or runs; ``model``: its queues, as they were read for
        it, None if there are none.

        Raises:
            BrokerUnavailable: no answer.
        """
        if job.scheduled:
            return Estimate()
        if job.is_running:
            return self._estimate_running(job, model)
        if model is None or job.priority not in model.by_priority:
            return Estimate()
        position = await find_position(
            self._broker, self._fleet, self._waiting_jobs, job, model, self._count_requeued
        )
        simulation = self._simulation(
            position.model, self._count_unreported(position.model) - position.is_delivered
        )
        own = _work(job.request, position.model)
        if simulation is None or own is None:
            return Estimate(position=position.ahead)
        own_priority = position.waiting_by_priority[job.priority]
        simulation.serve_typical(position.waiting - own_priority)
        next_requests = await read_next_requests(self._broker, self._waiting_jobs, job, position)
        for message in next_requests:
            request = decode_request.read(message.data, message.subject)
            work = _work(request, position.model)
            if work is not None:
                simulation.serve(work)
        simulation.serve_typical(own_priority - len(next_requests))
        simulation.serve_arrivals(
            self._waiting_jobs.arrivals.per_s(position.model.token, higher_than(job.priority))
        )
        done_s = simulation.done_s(simulation.serve(own), _waiting_behind(position))
        return Estimate(position=position.ahead, eta=self._eta(done_s, job))

    def knows_of(self, job_id: str) -> bool:
        """Whether this gateway knows that an attempt of the job has begun or ended."""
        return self._running.knows_of(job_id)

    def runs(self, job_id: str) -> bool:
        """Whether an inferer runs the job, which the queue may have lost: as it says in its entry,
        or since a moment ago."""
        has_just_started = self._running.has_just_started(job_id, self._broker.now())
        return has_just_started or self._fleet.runs(job_id)

    def retry_after_s(self, model: ModelConsumers, jobs: int) -> int:
        """Whole seconds until ``jobs`` of the waiting jobs will have been delivered."""
        if not any(entry.slots for entry in self._fleet.inferers(model.token)):
            return RETRY_AFTER_UNSERVED_S
        simulation = self._simulation(model, self._count_unreported(model))
        if simulation is None:
            return RETRY_AFTER_UNMEASURED_S
        simulation.serve_typical(jobs - 1)
        free_s = float(numpy.median(simulation.next_free_s))
        return math.ceil(min(max(free_s, 1.0), MAX_JOB_LIFETIME.total_seconds()))

    def _estimate_running(self, job: PendingJob, model: ModelConsumers | None) -> Estimate:
        attempts = self._running_attempts(token_of(job.model))
        attempt = attempts.get(job.id)
        if attempt is None or attempt.work is None:
            return Estimate()
        progress = None
        if attempt.work.task in TEXT_TASKS:
            progress = Progress(attempt.tokens, attempt.work.most_tokens)
        entries = self._fleet.inferers(token_of(job.model))
        service_time = self._service_time(token_of(job.model), entries)
        if not service_time.is_known:
            return Estimate(progress=progress)
        (entry,) = (entry for entry in entries if entry.id == attempt.inferer)
        slots = [slot for slot in _slots(entry, attempts.values()) if slot.attempt != attempt]
        simulation = self._new_simulation(service_time, [Slot(entry.id, attempt), *slots], [entry])
        waiting = 0 if model is None else model.waiting // len(entries)
        done_s = simulation.done_s(FIRST_SLOT, waiting)
        return Estimate(progress=progress, eta=self._eta(done_s, job))

    def _simulation(self, model: ModelConsumers, unreported: int) -> Simulation | None:
        """The model's slots with what they run, after serving ``unreported`` jobs that were
        delivered before; None while there are no measurements or no slots."""
        entries = self._fleet.inferers(model.token)
        service_time = self._service_time(model.token, entries)
        if not service_time.is_known:
            return None
        attempts: dict[str, list[RunningAttempt]] = {}
        for attempt in self._running_attempts(model.token).values():
            attempts.setdefault(attempt.inferer, []).append(attempt)
        slots = [slot for entry in entries for slot in _slots(entry, attempts.get(entry.id, ()))]
        if not slots:
            return None
        simulation = self._new_simulation(service_time, slots, entries)
        simulation.serve_typical(unreported)
        return simulation

    def _service_time(self, model: str, entries: Iterable[InfererEntry]) -> ServiceTime:
        service_time = self._service_times.setdefault(model, ServiceTime())
        service_time.report(entries)
        return service_time

    def _new_simulation(
        self, service_time: ServiceTime, slots: list[Slot], entries: Iterable[InfererEntry]
    ) -> Simulation:
        slowdowns = {entry.id: entry.slowdowns for entry in entries}
        return Simulation(service_time, slots, self._broker.now(), slowdowns)

    def _count_unreported(self, model: ModelConsumers) -> int:
        """Jobs in flight that no inferer reports: they are starting, or will be redelivered."""
        return max(0, model.in_flight - len(self._running_attempts(model.token)))

    def _count_requeued(self, model: ModelConsumers) -> int:
        """How many of the unreported jobs will be redelivered: none while jobs start and end,
        since then their events are on the way, and a redelivered job would start at once."""
        return self._count_unreported(model) if self._running.quiet_s > QUIET_S else 0

    def _running_attempts(self, model: str) -> dict[str, RunningAttempt]:
        return self._running.running_on(self._fleet.inferers(model), self._broker.now())

    def _eta(self, done_s: Floats, job: PendingJob) -> Eta:
        """The quantiles of ``done_s``; never later than the job's deadline, which ends the job."""
        now = self._broker.now()
        latest_s = MAX_JOB_LIFETIME.total_seconds()
        if job.deadline is not None:
            latest_s = min(max((job.deadline - now).total_seconds(), 0.0), latest_s)
        done_s = numpy.clip(done_s, 0.0, latest_s)
        p50_s, p90_s = (float(quantile) for quantile in numpy.quantile(done_s, (0.5, 0.9)))
        return Eta(round(p50_s, 3), round(p90_s, 3), timestamp(now + timedelta(seconds=p50_s)))

    async def _on_state_event(self, message: Msg) -> None:
        event = decode_state_event.read(message.data, message.subject)
        if event is not None:
            self._running.on_state_event(subjects.model_and_id(message.subject)[1], event)


def _slots(entry: InfererEntry, attempts: Iterable[RunningAttempt]) -> list[Slot]:
    """The slots of an inferer with those of ``attempts`` that they run."""
    slots = [Slot(entry.id, attempt) for attempt in attempts if attempt.inferer == entry.id]
    return [*slots, *[Slot(entry.id)] * (entry.slots - len(slots))][: entry.slots]


def _waiting_behind(position: QueuePosition) -> int:
    """How many jobs of the model wait behind the one at ``position``."""
    return max(position.model.waiting - position.waiting - 1, 0)


def _work(request: InferenceRequest | None, model: ModelConsumers) -> Work | None:
    """The size of a waiting request; None if it cannot be read or the model is not known yet."""
    if request is None or model.facts is None:
        return None
    return request.work(model.facts.n_ctx)
