"""Where a job is and when it will be done, and how long to stay away from a full queue."""

import math
from contextlib import suppress
from datetime import timedelta

import numpy
from msgspec import Struct
from msgspec.structs import asdict, replace
from nats.aio.msg import Msg

from services.gateway.eta.lengths import Floats
from services.gateway.eta.position import find_place, read_ahead
from services.gateway.eta.running_jobs import Run, RunningJobs
from services.gateway.eta.service_time import Pace
from services.gateway.eta.simulation import Simulation, Slot
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import Unfinished
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers
from shared.broker.results import decode_stored
from shared.errors import BrokerUnavailable
from shared.job_ids import LONGEST_JOB
from shared.logs import logger
from shared.model_names import token_of
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import Eta, JobStatus, Progress
from shared.wire.codecs import decode_request, decode_state_event
from shared.wire.requests import InferenceRequest, Work
from shared.wire.results import Completed, Result

LESSONS = 300
"""Stored results that a gateway which has just started learns from."""
LESSONS_BYTES = 8 * 1024 * 1024
QUIET_S = 2.0
READ_AHEAD = 32
"""Jobs ahead that are looked at one by one; those behind them are taken to be as usual."""
WHILE_UNKNOWN_S = 5
WHILE_UNSERVED_S = 30
"""How long to stay away while nothing has been measured, and while nobody serves the model."""


log = logger()


class Outlook(Struct, frozen=True):
    """What is not known, or does not apply, is None."""

    position: int | None = None
    progress: Progress | None = None
    eta: Eta | None = None

    def added_to(self, status: JobStatus) -> JobStatus:
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(status, **known)


class Forecast:
    """Learns from every result that is announced. What it holds can be learned again."""

    def __init__(self, broker: Broker, fleet: Fleet) -> None:
        self._broker = broker
        self._fleet = fleet
        self._running = RunningJobs()
        self._paces: dict[str, Pace] = {}

    async def start(self) -> None:
        """Learn from what is stored, and hear from now on which jobs start."""
        await self._broker.nc.subscribe(subjects.state_events("*"), cb=self._hear)
        try:
            await self._learn_from_stored()
        except BrokerUnavailable as error:
            log.warning("lessons_missed", error=error.message)

    async def _learn_from_stored(self) -> None:
        everything = subjects.result("*")
        newest = await self._broker.direct_get(subjects.RESULTS, last_by_subj=everything)
        if newest is None:
            return
        for stored in await self._broker.direct_get_all(
            subjects.RESULTS,
            seq=max(1, newest.sequence - LESSONS),
            next_by_subj=everything,
            batch=LESSONS + 1,
            max_bytes=LESSONS_BYTES,
        ):
            self.learn(
                decode_stored(subjects.last_token(stored.subject), stored.data, self._broker.now())
            )

    def learn(self, result: Result) -> None:
        """Take a result into account."""
        self._running.end(result.id)
        if isinstance(result, Completed):
            with suppress(ValueError):  # put there by hand
                self._paces.setdefault(token_of(result.model), Pace()).learn(result)

    async def of(self, job: Unfinished) -> Outlook:
        """The outlook of a job that waits or runs.

        Raises:
            BrokerUnavailable: no answer.
        """
        if job.scheduled:
            return Outlook()
        if job.is_running:
            return self._of_running(job)
        place = await find_place(self._broker, job, self._returned)
        if place is None:
            return Outlook()
        simulation = self._simulation(place.model, self._out(place.model) - place.is_given_out)
        own = _work(job.request, place.model)
        if simulation is None or own is None:
            return Outlook(position=place.ahead)
        ahead = await read_ahead(self._broker, job, place, READ_AHEAD)
        for message in ahead:
            request = decode_request.read(message.data, message.subject)
            work = _work(request, place.model)
            if work is not None:
                simulation.serve(work)
        simulation.serve_usual(place.waiting - len(ahead))
        return Outlook(position=place.ahead, eta=self._eta(simulation.serve(own), job))

    def retry_after_s(self, model: ModelConsumers, jobs: int) -> int:
        """Whole seconds until ``jobs`` of those that wait will have been taken."""
        if not any(entry.slots for entry in self._fleet.inferers.get(model.token, [])):
            return WHILE_UNSERVED_S
        simulation = self._simulation(model, self._out(model))
        if simulation is None:
            return WHILE_UNKNOWN_S
        simulation.serve_usual(jobs - 1)
        free_s = float(numpy.median(simulation.free_s.min(axis=0)))
        return math.ceil(min(max(free_s, 1.0), LONGEST_JOB.total_seconds()))

    def _of_running(self, job: Unfinished) -> Outlook:
        run = self._runs(token_of(job.model)).get(job.id)
        if run is None or run.work is None:
            return Outlook()
        progress = Progress(run.tokens, run.work.max_tokens)
        pace = self._paces.get(token_of(job.model))
        if pace is None or not pace.is_known:
            return Outlook(progress=progress)
        simulation = Simulation(pace, [Slot(run.inferer, run)], self._broker.now())
        return Outlook(progress=progress, eta=self._eta(simulation.free_s[0], job))

    def _simulation(self, model: ModelConsumers, out: int) -> Simulation | None:
        """The slots of the model with what they run, then ``out`` jobs that were given out before;
        None while there is nothing to go by."""
        pace = self._paces.get(model.token)
        if pace is None or not pace.is_known:
            return None
        runs = self._runs(model.token)
        slots: list[Slot] = []
        for entry in self._fleet.inferers.get(model.token, []):
            held: list[Run | None] = [run for run in runs.values() if run.inferer == entry.id]
            held += [None] * (entry.slots - len(held))
            slots += [Slot(entry.id, run) for run in held[: entry.slots]]
        if not slots:
            return None
        simulation = Simulation(pace, slots, self._broker.now())
        simulation.serve_usual(out)
        return simulation

    def _out(self, model: ModelConsumers) -> int:
        """Jobs that have been given out and that nobody speaks of: they begin, or come back."""
        return max(0, model.in_flight - len(self._runs(model.token)))

    def _returned(self, model: ModelConsumers) -> int:
        """Those of them that come back. While jobs begin and end it is the news of them that is on
        its way; and then, where somebody takes jobs, what comes back is taken at once."""
        return self._out(model) if self._running.quiet_s > QUIET_S else 0

    def _runs(self, model: str) -> dict[str, Run]:
        return self._running.of(self._fleet.inferers.get(model, []), self._broker.now())

    def _eta(self, done_s: Floats, job: Unfinished) -> Eta:
        """Never later than the job's deadline, which ends it in any case."""
        now = self._broker.now()
        latest_s = LONGEST_JOB.total_seconds()
        if job.deadline is not None:
            latest_s = min(max((job.deadline - now).total_seconds(), 0.0), latest_s)
        done_s = numpy.clip(done_s, 0.0, latest_s)
        p50_s, p90_s = (float(quantile) for quantile in numpy.quantile(done_s, (0.5, 0.9)))
        return Eta(round(p50_s, 3), round(p90_s, 3), timestamp(now + timedelta(seconds=p50_s)))

    async def _hear(self, message: Msg) -> None:
        event = decode_state_event.read(message.data, message.subject)
        if event is not None:
            self._running.hear(message.subject.split(".")[2], event)


def _work(request: InferenceRequest | None, model: ModelConsumers) -> Work | None:
    """How much a waiting request is; None when it is none, or nobody knows the model yet."""
    if request is None or model.facts is None:
        return None
    return request.work(model.facts.n_ctx)
