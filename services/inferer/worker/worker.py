"""One job at a time through each slot: pull, check, run, store, reply, acknowledge.

The order of the steps is what makes a crash between any two of them harmless: the attempt is
repeated, and no visible result changes.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

from nats.aio.msg import Msg

from services.inferer.crash.flight_recorder import FlightRecorder
from services.inferer.engine.set_up import AnyEngine
from services.inferer.engine.speed import MeasuredSpeed, Speed
from services.inferer.worker.auto_concurrency import AutoConcurrency
from services.inferer.worker.delivery import REQUEUED, Job, NoResult
from services.inferer.worker.executor import Executor
from services.inferer.worker.handover import Handover
from services.inferer.worker.job_store import JobStore
from services.inferer.worker.lease import Lease, acknowledge, requeue
from services.inferer.worker.pull import Puller
from services.inferer.worker.slots import Slots
from shared.background import Tasks
from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.config import LAST_PRIORITY, StartConcurrency
from shared.errors import BrokerUnavailable, CommandRefused
from shared.logs import logger
from shared.prompt_prefixes import PromptPrefixes, fingerprints
from shared.timestamps import milliseconds_between, timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_cancel_notice, skip
from shared.wire.events import CancelNotice
from shared.wire.inferers import InfererState, RunningJob
from shared.wire.results import Result

RETRY_WITHOUT_GATEWAY_S = 5.0
"""Short: a delayed message counts under the limit of its queue, and would block a queue whose limit
is 1."""

RETURN_S = 3.0
SETTLE_S = 5.0
"""How long after the grace a stopping inferer tries to store what became of its jobs."""

log = logger()


class Worker:
    """The slots of one inferer."""

    def __init__(
        self,
        broker: Broker,
        engine: AnyEngine,
        *,
        recorder: FlightRecorder,
        inferer_id: str,
        model: str,
        concurrency: StartConcurrency,
        priority: int,
        max_attempts: int,
        retry_s: float,
        grace_s: float,
        tested_speed: MeasuredSpeed = MeasuredSpeed(),
    ) -> None:
        self._broker = broker
        self._id = inferer_id
        self._store = JobStore(broker, inferer_id)
        self.speed = Speed(tested_speed)
        self._executor = Executor(
            broker,
            engine,
            self._store,
            recorder,
            inferer_id=inferer_id,
            speed=self.speed,
            max_attempts=max_attempts,
            retry_s=retry_s,
        )
        self._engine = engine
        self.model = model
        self.prefixes = PromptPrefixes()
        self._handover = Handover(broker, inferer_id, model, priority, self.prefixes)
        self._priority = priority
        self._grace_s = grace_s
        self._jobs: dict[str, Job] = {}
        self.active = asyncio.Event()
        """Set while there are jobs."""
        self._is_serving = False
        self._stopping = False
        self._requeuing = False
        self._slots_at_start = 1 if concurrency == "auto" else concurrency
        self._slots = Slots(self.process)
        self._group: asyncio.TaskGroup | None = None
        self._growing = asyncio.Lock()
        self._store_entry: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._storing = Tasks()
        self._auto = None
        if concurrency == "auto":
            self._auto = AutoConcurrency(engine, self._slots, self._make_room)
        self._idle_since = timestamp(broker.now())

    @property
    def slots(self) -> int:
        """How many jobs this inferer takes at once now."""
        return self._slots.count if self._is_serving else self._slots_at_start

    @property
    def busy(self) -> int:
        return len(self._jobs)

    @property
    def state(self) -> InfererState:
        return "stopping" if self._stopping else "busy" if self._jobs else "idle"

    @property
    def idle_since(self) -> str | None:
        """When it was ready, or its last job left it; None while it has one."""
        return None if self._jobs else self._idle_since

    @property
    def running(self) -> list[RunningJob]:
        jobs = [job.progress() for job in self._jobs.values()]
        return [job for job in jobs if job is not None]

    async def run(
        self,
        stopping: asyncio.Event,
        on_ready: Callable[[], None],
        store_entry: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Serve until ``stopping`` is set; jobs that are then under way get their grace.
        ``store_entry`` publishes this inferer's entry as it is now."""
        self._store_entry = store_entry
        cancels = await self._broker.nc.subscribe(subjects.cancels(self.model), cb=self._on_cancel)
        offers = await self._broker.nc.subscribe(
            subjects.handover(self.model, self._id), "handover", cb=self._on_offer
        )
        try:
            async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
                self._group = group
                self._slots.set(self._slots_at_start)
                puller = Puller(self._broker, self.model, self._priority_of_pull)
                group.create_task(self._slots.serve(group, puller), name="serve")
                self._is_serving = True
                on_ready()
                await stopping.wait()
                self._stopping = True
                with suppress(*TRANSIENT):
                    # Offers that have arrived are refused, so that nobody waits for an answer.
                    await self._broker.nc.end_at_broker(offers)
                await self._end_auto()
                self._slots.end()
                log.info("inferer_stopping", running=self.busy, grace_s=self._grace_s)
                now = asyncio.get_running_loop().time()
                limit.reschedule(now + self._grace_s + SETTLE_S)
                await self._wait_for_jobs(self._grace_s)
                self._requeuing = True
                for job in self._jobs.values():
                    job.interrupt(REQUEUED)
        except TimeoutError:
            # The broker is away: the lease will expire, and the job will be redelivered.
            log.warning("jobs_left_unsettled", job_ids=list(self._jobs))
        finally:
            await cancels.unsubscribe()
            await offers.unsubscribe()
            await self._storing.end(RETURN_S)

    async def set_slots(self, count: int) -> None:
        """Open or close slots; no running job is touched, and no idle slot that closes takes one.

        Raises:
            OutOfMemory: no room for so many contexts.
            CommandRefused: this inferer is starting or stopping.
        """
        await self._make_room(count)
        # Checked after the growth: it may have taken a while.
        if not self._is_serving or self._stopping:
            raise CommandRefused("this inferer is starting or stopping")
        await self._end_auto()
        self._slots.set(count)
        with suppress(TimeoutError):
            await self._slots.settled()

    async def _make_room(self, count: int) -> None:
        """Have the engine make room for ``count`` jobs.

        Raises:
            ModelError: it cannot; OutOfMemory: no room for so many contexts.
        """
        async with self._growing:
            if count > self._engine.slots and not self._stopping:
                await asyncio.wrap_future(self._engine.grow(count))

    async def _end_auto(self) -> None:
        auto, self._auto = self._auto, None
        if auto:
            await auto.end()

    def _priority_of_pull(self) -> int:
        """With ``auto`` an inferer that is busy leaves the next job to one that is not."""
        busy = self._slots.busy if self._auto else 0
        if self._executor.missing_adapters:
            # Whoever has them comes first: jobs would go back and forth while it is idle.
            return LAST_PRIORITY
        return min(self._priority + busy, LAST_PRIORITY)

    async def _wait_for_jobs(self, timeout_s: float) -> None:
        running = [asyncio.create_task(job.settled.wait()) for job in self._jobs.values()]
        if running:
            await asyncio.wait(running, timeout=timeout_s)

    async def process(self, message: Msg) -> None:
        """Everything that happens to one delivery of one job. The broker's confirmation that it is
        off the queue is awaited in the background."""
        with ExitStack() as held:
            held.callback(Lease(message).end)
            try:
                job = Job(message, self._broker.now)
            except ValueError as error:
                # Such an id cannot be part of a subject, so no result can be sent.
                skip("request", message.subject, error)
                await message.term()
                return
            while job.id in self._jobs:
                # Its lease ran out and it came to another slot of ours: the first run decides.
                await self._jobs[job.id].settled.wait()
            # Before anything is read: a cancel that comes from now on is not missed.
            self._jobs[job.id] = job
            self.active.set()
            held.callback(self._forget, job)
            if self._auto:
                self._auto.adjust()
            if await self._handover.offer(job, self._slots.busy - 1):
                return
            if self._requeuing:
                job.interrupt(REQUEUED)
            self._remember(job)
            outcome = await self._executor.outcome(job)
            if outcome is NoResult.REQUEUED:
                await self._requeue(job)
            elif outcome is NoResult.RETRY_SCHEDULED:
                await acknowledge(job.message)
            elif outcome is NoResult.RETRY_DELAYED:
                await requeue(job.message, RETRY_WITHOUT_GATEWAY_S)
            else:
                await self._settle(job, outcome, held)

    def _remember(self, job: Job) -> None:
        """Publish the fingerprints of the job's prompt, so that gateways send similar ones here."""
        if job.malformed is not None or not (self._engine.has_cache and job.request.cache_prompt):
            return
        if self._executor.lacks_adapter(job):
            return
        found = fingerprints(job.owner, job.request)
        if self.prefixes.add(found) and self._store_entry is not None:
            self._storing.start(self._store_entry(), "store the entry")

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        if not self._jobs:
            self.active.clear()
        self._idle_since = timestamp(self._broker.now())
        job.settled.set()
        if self._auto:
            self._auto.adjust()

    async def _settle(self, job: Job, result: Result, held: ExitStack) -> None:
        """Store the result, send it to the caller, and only then take the message off the queue.

        The last two are done in the background, but begun here, so that the next pull goes out with
        them. What is ``held`` for the job is released when the acknowledgement is confirmed.
        """
        stored = await self._store.store(job, result)
        assert self._group is not None
        self._group.create_task(
            self._take_off_queue(job, stored, held.pop_all()), name=f"reply and ack {job.id}"
        )
        await asyncio.sleep(0)  # the task begins

    async def _take_off_queue(self, job: Job, stored: Result, held: ExitStack) -> None:
        """Send the stored result to the caller, then acknowledge the message."""
        with held:
            reconnected = asyncio.Event()
            held.callback(self._broker.on_reconnect(reconnected.set))
            await self._store.reply(job, stored)
            if job.announced is not None:
                await job.announced
            await acknowledge(job.message)
            if reconnected.is_set():
                # The reply may have been lost with the connection that the ack did not go over.
                await self._store.reply(job, stored)
        usage = getattr(stored, "usage", None)
        log.info(
            "job_finished",
            job_id=job.id,
            model=self.model,
            attempt=stored.attempt,
            outcome=type(stored).__name__.lower(),
            code=getattr(stored, "code", None),
            queue_ms=round(milliseconds_between(stored.queued_at, stored.started_at), 1)
            if stored.started_at
            else None,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.prompt_tokens_details.cached_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            infer_ms=round(milliseconds_between(stored.started_at, stored.finished_at), 1)
            if stored.started_at
            else None,
        )

    async def _requeue(self, job: Job) -> None:
        """Leave an unfinished job to another inferer; it does not count as an attempt."""
        try:
            async with asyncio.timeout(RETURN_S):
                # A job that never started stays as it was, even if its last attempt was lost.
                if job.announced is not None:
                    await job.announced
                    await self._store.announce_return(job)
        except (BrokerUnavailable, TimeoutError):
            log.warning("return_not_announced", job_id=job.id)
        await requeue(job.message)
        log.info("job_requeued", job_id=job.id, model=self.model, attempt=job.attempt)

    async def _on_offer(self, message: Msg) -> None:
        await self._handover.serve(message, self._slots.take)

    async def _on_cancel(self, message: Msg) -> None:
        _, job_id = subjects.model_and_id(message.subject)
        job = self._jobs.get(job_id)
        if job is None:
            return
        # Published by hand, or by a version with other reasons: the job is cancelled all the same.
        notice = decode_cancel_notice.read(message.data, message.subject)
        notice = notice or CancelNotice(code="cancelled")
        job.interrupt(notice.code)
