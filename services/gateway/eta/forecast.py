"""Estimates for clients: a job's position, progress and ETA, or why it cannot start, and when a
full queue has room."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeVar

import numpy
from msgspec import UNSET, Struct
from msgspec.structs import asdict, replace
from nats.aio.msg import Msg

from services.gateway.eta.lengths import Floats
from services.gateway.eta.line import Line
from services.gateway.eta.position import QueuedJob, find_position, position_of, settled
from services.gateway.eta.running_jobs import RunningAttempt, RunningJobs
from services.gateway.eta.service_time import ServiceTime
from services.gateway.eta.simulation import Batching, Simulation, Slot, Waiting, in_turns
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import PendingJob
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.broker.inferers import find_blockage
from shared.broker.results import decode_stored
from shared.errors import BrokerUnavailable
from shared.logs import logger
from shared.model_names import token_of
from shared.retention import MAX_JOB_LIFETIME
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import Eta, JobStatus, Progress
from shared.wire.codecs import decode_state_event
from shared.wire.inferers import InfererEntry
from shared.wire.listing import ListedJob
from shared.wire.requests import TEXT_TASKS
from shared.wire.results import Completed, Result

MAX_STORED_SAMPLES = 300
"""How many stored results a gateway reads when it starts."""
MAX_STORED_SAMPLE_BYTES = 8 * 1024 * 1024
QUIET_S = 2.0
RETRY_AFTER_UNMEASURED_S = 5
RETRY_AFTER_UNSERVED_S = 30
"""``Retry-After`` while nothing has been measured, and while no inferer serves the model."""

rank = subjects.PRIORITIES.index
Shown = TypeVar("Shown", JobStatus, ListedJob)

log = logger()


class Estimate(Struct, frozen=True):
    """None stands for what is not known or does not apply."""

    position: int | None = None
    progress: Progress | None = None
    eta: Eta | None = None
    blocked_reason: str | None = None

    def added_to(self, job: Shown) -> Shown:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(job, **known)


class Forecast:
    """Estimates from measurements of one gateway's lifetime; a restart reads the latest results."""

    def __init__(self, broker: Broker, fleet: Fleet, waiting_jobs: WaitingJobs) -> None:
        self._broker = broker
        self._fleet = fleet
        self._waiting_jobs = waiting_jobs
        self._running = RunningJobs()
        self._service_times: dict[str, ServiceTime] = {}
        self._line = Line(broker, waiting_jobs)
        fleet.on_refresh(waiting_jobs.on_queues_read)
        waiting_jobs.on_accepted(fleet.on_accepted)

    async def start(self) -> None:
        """Read the stored results, and subscribe to the events of jobs that start and end."""
        await self._broker.nc.subscribe_directly(subjects.STATES_WILDCARD, self._on_state_event)
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
        """The estimate for a job that waits or runs, or why it cannot start; ``model``: its queues,
        as they were read for it, None if there are none.

        Raises:
            BrokerUnavailable: no answer.
        """
        estimate = await self._estimate(job, model)
        blockage = find_blockage(job.model, self._fleet.inferers(token_of(job.model)))
        if blockage is None or self.runs(job.id):
            return estimate
        return replace(estimate, blocked_reason=f"{blockage.cause}: {blockage.advice}")

    async def _estimate(self, job: PendingJob, model: ModelConsumers | None) -> Estimate:
        if job.scheduled:
            return Estimate()
        if job.is_running:
            return await self._estimate_running(job, model)
        if model is None or job.priority not in model.by_priority:
            return Estimate()
        position = await find_position(
            self._broker, self._fleet, self._waiting_jobs, job, model, self._count_requeued
        )
        model = position.model
        simulation = self._simulation(model, self._count_unreported(model) - position.is_delivered)
        own = self._line.note(job.message, job.request, model)
        if simulation is None or own is None:
            return Estimate(position=position.ahead)
        request = subjects.RequestSubject.parse(job.message.subject)
        line = await self._line.first(model)
        if request in line:
            at = line.index(request)
        else:
            # Of its own priority, those that wait are behind it only if it was delivered.
            place = bisect_left if position.is_delivered else bisect_right
            at = place(line, rank(job.priority), key=lambda one: rank(one.priority))
            line.insert(at, request)
        waiting = await self._line.with_sizes(line, model)
        waiting[at] = replace(waiting[at], unknown_before=max(position.waiting - at, 0))
        (done_s,) = await self._run(simulation, model, waiting, [at])
        return Estimate(position=position.ahead, eta=self._eta(*done_s, job.deadline))

    async def queues(self, tokens: Collection[str]) -> Mapping[str, ModelConsumers]:
        """The queues of models, as `estimate_queued` takes them; those that have one.

        Raises:
            BrokerUnavailable: no answer.
        """
        found = await self._fleet.queues()
        models = {token: found[token] for token in tokens if token in found}
        return await settled(self._fleet, models, self._count_requeued)

    async def estimate_queued(
        self, model: ModelConsumers, jobs: Sequence[QueuedJob], first: Sequence[QueuedJob]
    ) -> dict[str, Estimate]:
        """Estimates for several ``jobs`` of a model by their ids; those of them that are among its
        ``first`` jobs on the queue have an ETA, all from one simulation.

        Raises:
            BrokerUnavailable: no answer.
        """
        requeued = self._count_requeued(model)
        estimates = {
            job.request.job_id: Estimate(
                position_of(job.request.priority, model, job.between, requeued).ahead
            )
            for job in jobs
        }
        running = self._running_attempts(model.token)
        first = [job for job in first if job.request.job_id not in running]
        delivered = sum(job.between is None for job in first)
        wanted = [at for at, job in enumerate(first) if job.request.job_id in estimates]
        simulation = None
        if wanted and model.facts is not None:
            simulation = self._simulation(model, self._count_unreported(model) - delivered)
        if simulation is None:
            return estimates
        line = await self._line.with_sizes([job.request for job in first], model)
        wanted = [at for at in wanted if line[at].work is not None]
        all_done_s = await self._run(simulation, model, line, wanted)
        for at, done_s in zip(wanted, all_done_s, strict=True):
            job_id = first[at].request.job_id
            eta = self._eta(*done_s, first[at].deadline)
            estimates[job_id] = replace(estimates[job_id], eta=eta)
        return estimates

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

    async def _estimate_running(self, job: PendingJob, model: ModelConsumers | None) -> Estimate:
        attempts = self._running_attempts(token_of(job.model))
        attempt = attempts.get(job.id)
        if attempt is None or attempt.work is None:
            return Estimate()
        progress = None
        if attempt.work.task in TEXT_TASKS:
            left = attempt.prompt_tokens_left
            progress = Progress(
                attempt.tokens, attempt.work.most_tokens, UNSET if left is None else left
            )
        entries = self._fleet.inferers(token_of(job.model))
        service_time = self._service_time(token_of(job.model), entries)
        if not service_time.is_known:
            return Estimate(progress=progress)
        (entry,) = (entry for entry in entries if entry.id == attempt.inferer)
        slots = [slot for slot in _slots(entry, attempts.values()) if slot.attempt != attempt]
        # The inferer gets its share of the jobs that wait and of those that come.
        all_slots = max(sum(one.slots for one in entries), 1)
        simulation = self._new_simulation(
            service_time,
            [Slot(entry.id, attempt), *slots],
            [entry],
            self._arrivals_per_s(token_of(job.model)) * entry.slots / all_slots,
        )
        waiting = 0 if model is None else model.waiting * entry.slots // all_slots
        (done_s,) = _quantiles(await in_turns(simulation.follow([0], waiting)))
        return Estimate(progress=progress, eta=self._eta(*done_s, job.deadline))

    async def _run(
        self,
        simulation: Simulation,
        model: ModelConsumers,
        line: Sequence[Waiting],
        wanted: Collection[int],
    ) -> list[tuple[float, float]]:
        """`_quantiles` of the seconds until the jobs at ``wanted`` in ``line`` are done."""
        behind = model.waiting - sum(1 + job.unknown_before for job in line)
        return _quantiles(await in_turns(simulation.run(line, wanted, max(behind, 0))))

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
        simulation = self._new_simulation(
            service_time, slots, entries, self._arrivals_per_s(model.token)
        )
        simulation.serve_typical(unreported)
        return simulation

    def _service_time(self, model: str, entries: Iterable[InfererEntry]) -> ServiceTime:
        service_time = self._service_times.setdefault(model, ServiceTime())
        service_time.report(entries)
        return service_time

    def _new_simulation(
        self,
        service_time: ServiceTime,
        slots: list[Slot],
        entries: Iterable[InfererEntry],
        arrivals_per_s: float,
    ) -> Simulation:
        batching = {entry.id: Batching(entry.slowdowns, entry.jobs_per_batch) for entry in entries}
        now = self._broker.now()
        return Simulation(service_time, slots, now, batching, arrivals_per_s)

    def _arrivals_per_s(self, model: str) -> float:
        return self._waiting_jobs.arrivals.per_s(model, subjects.PRIORITIES)

    def _count_unreported(self, model: ModelConsumers) -> int:
        """Jobs in flight that no inferer reports: they are starting, or will be redelivered."""
        return max(0, model.in_flight - len(self._running_attempts(model.token)))

    def _count_requeued(self, model: ModelConsumers) -> int:
        """How many of the unreported jobs will be redelivered: none while jobs start and end,
        since then their events are on the way, and a redelivered job would start at once."""
        return self._count_unreported(model) if self._running.quiet_s > QUIET_S else 0

    def _running_attempts(self, model: str) -> dict[str, RunningAttempt]:
        return self._running.running_on(self._fleet.live(model), self._broker.now())

    def _eta(self, p50_s: float, p90_s: float, deadline: datetime | None) -> Eta:
        """Never later than the job's deadline, which ends the job."""
        now = self._broker.now()
        if deadline is not None:
            left_s = max((deadline - now).total_seconds(), 0.0)
            p50_s, p90_s = min(p50_s, left_s), min(p90_s, left_s)
        return Eta(round(p50_s, 3), round(p90_s, 3), timestamp(now + timedelta(seconds=p50_s)))

    def _on_state_event(self, message: Msg) -> None:
        event = decode_state_event.read(message.data, message.subject)
        if event is not None:
            self._running.on_state_event(subjects.model_and_id(message.subject)[1], event)


def _quantiles(done_s: Floats) -> list[tuple[float, float]]:
    """The median and the 90th percentile of each row; no job takes longer than its lifetime. Those
    of all rows at once are computed much faster than one by one."""
    done_s = numpy.clip(done_s, 0.0, MAX_JOB_LIFETIME.total_seconds())
    p50_s, p90_s = numpy.quantile(done_s, (0.5, 0.9), axis=1).tolist()
    return list(zip(p50_s, p90_s, strict=True))


def _slots(entry: InfererEntry, attempts: Iterable[RunningAttempt]) -> list[Slot]:
    """The slots of an inferer with those of ``attempts`` that they run."""
    slots = [Slot(entry.id, attempt) for attempt in attempts if attempt.inferer == entry.id]
    return [*slots, *[Slot(entry.id)] * (entry.slots - len(slots))][: entry.slots]
