"""One job at a time through each slot: pull, look, run, store, reply, acknowledge.

The order of the steps is what makes a crash between any two of them harmless: the attempt is
repeated, and no visible result changes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Literal, TypeVar

import msgspec
from nats.aio.msg import Msg
from nats.js.api import PubAck

from services.inferer.engine import Engine, Generation
from services.inferer.inference import Inference
from services.inferer.job import HANDED_BACK, Interrupted, Job
from services.inferer.lease import acknowledge, hand_back, lease
from services.inferer.pull import Puller
from services.inferer.slots import Slots
from services.inferer.speed import Speed
from shared import subjects
from shared.broker import RETRY_DELAY_S, Broker
from shared.errors import BrokerUnavailable, InvalidRequest, Refused, SluiceError
from shared.logs import logger
from shared.messages import (
    CancelNotice,
    DeadLetter,
    InfererState,
    Result,
    RunningJob,
    StateEvent,
    Timings,
    Usage,
    decode_cancel_notice,
    decode_state_event,
    encode,
)
from shared.results import read_result, send_result, store_result
from shared.timestamps import milliseconds_between, timestamp

PATIENCE_S = 2.0
"""How long one call waits for the broker before it is logged and made again."""

CLOSE_S = 2.0
"""How long to wait until idle slots have withdrawn their pulls."""

RETURN_S = 3.0
WORST_ESCAPE = 6
SETTLE_S = 5.0
"""How long after the grace a stopping inferer tries to tell the broker what became of its jobs."""

T = TypeVar("T")
log = logger()


class Worker:
    """The slots of one inferer."""

    def __init__(
        self,
        broker: Broker,
        engine: Engine,
        *,
        inferer_id: str,
        model: str,
        slots: int,
        priority: int,
        max_attempts: int,
        grace_s: float,
    ) -> None:
        self._broker = broker
        self._engine = engine
        self._id = inferer_id
        self.model = model
        self._priority = priority
        self._max_attempts = max_attempts
        self._grace_s = grace_s
        self._jobs: dict[str, Job] = {}
        self._stopping = False
        self._handing_back = False
        self._slots_at_start = slots
        self._slots: Slots | None = None
        self._idle_since = timestamp()
        self.speed = Speed()

    @property
    def slots(self) -> int:
        """How many jobs this inferer takes at once now."""
        return self._slots_at_start if self._slots is None else self._slots.count

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

    async def run(self, stopping: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Serve until ``stopping`` is set; jobs that are then under way get their grace."""
        cancels = await self._broker.nc.subscribe(subjects.CANCEL_WILDCARD, cb=self._hear_cancel)
        try:
            async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
                self._slots = Slots(group, self._puller, self.process)
                self._slots.set(self._slots_at_start)
                on_ready()
                await stopping.wait()
                self._stopping = True
                self._slots.set(0)
                log.info("inferer_stopping", running=self.busy, grace_s=self._grace_s)
                now = asyncio.get_running_loop().time()
                limit.reschedule(now + self._grace_s + SETTLE_S)
                await self._wait_for_jobs(self._grace_s)
                self._handing_back = True
                for job in self._jobs.values():
                    job.interrupt(HANDED_BACK)
        except TimeoutError:
            # The broker is away: the lease runs out by itself, and the job is repeated.
            log.warning("jobs_left_unsettled", job_ids=list(self._jobs))
        finally:
            await cancels.unsubscribe()

    async def set_slots(self, count: int) -> None:
        """Open or close slots; no running job is touched, and no idle slot that closes takes one.

        Raises:
            ModelError: no memory for so many contexts.
            Refused: this inferer is starting or stopping.
        """
        if count > self._engine.slots and not self._stopping:
            await asyncio.wrap_future(self._engine.grow(count))
        # Looked at after the growth: it may have taken a while.
        if self._slots is None or self._stopping:
            raise Refused("this inferer is starting or stopping")
        closed = self._slots.set(count)
        if closed:
            await asyncio.wait(closed, timeout=CLOSE_S)

    def _puller(self) -> Puller:
        return Puller(self._broker, self.model, self._priority)

    async def _wait_for_jobs(self, timeout_s: float) -> None:
        running = [asyncio.create_task(job.settled.wait()) for job in self._jobs.values()]
        if running:
            await asyncio.wait(running, timeout=timeout_s)

    async def process(self, message: Msg) -> None:
        """Everything that happens to one delivery of one job."""
        async with lease(message):
            job = Job(message)
            while job.id in self._jobs:
                # Its lease ran out and it came to another slot of ours: the first run decides.
                await self._jobs[job.id].settled.wait()
            # Before anything is looked up: a cancel that comes from now on is not missed.
            self._jobs[job.id] = job
            if self._handing_back:
                job.interrupt(HANDED_BACK)
            try:
                try:
                    result = await self._decide(job)
                except Exception as error:
                    # It would do the same to the next inferer, and to the next.
                    log.exception("job_crashed", job_id=job.id)
                    result = await self._bury(
                        job, "internal_error", f"a fault of the inferer: {error!r}"
                    )
                if result is None:
                    await self._return(job)
                    return
                await self._settle(job, result)
            finally:
                del self._jobs[job.id]
                self._idle_since = timestamp()
                job.settled.set()

    async def _decide(self, job: Job) -> Result | None:
        """The job's result: one that is there already, or a new one; None to hand it back."""
        if job.malformed is not None:
            return await self._find_result(job) or await self._bury(
                job, InvalidRequest.code, job.malformed
            )
        if not job.is_first_delivery:
            stored, last = await asyncio.gather(self._find_result(job), self._last_state(job))
            if stored is not None:
                return stored
            job.count_attempt(last)
        if job.interruption is not None:
            return self._stopped(job)
        if job.deadline is not None and job.deadline <= datetime.now(UTC):
            return job.stopped("deadline_passed")
        if job.attempt > self._max_attempts:
            return await self._bury(
                job,
                "worker_lost",
                f"{self._max_attempts} inferers in a row were lost while they ran this job",
            )
        return await self._run(job)

    async def _run(self, job: Job) -> Result | None:
        job.start(self._engine.n_ctx)
        # On its way before the first token is, on the same connection, so readers see it first;
        # nobody need wait for the broker's answer until the job leaves the queue.
        job.announced = asyncio.create_task(
            self._insist(lambda: self._publish_state(job, "started", PATIENCE_S))
        )
        looking = None
        if job.is_first_delivery:
            looking = asyncio.create_task(self._stop_if_cancelled(job))
        else:
            # Unless this is known the start does not count, and a job that kills its inferers
            # would never be seen for what it is.
            await job.announced
        try:
            generation, text = await Inference(self._broker, self._engine, job).run()
        except Interrupted:
            return self._stopped(job)
        except SluiceError as error:
            return job.failed(error.code, error.message, self._id)
        finally:
            if looking is not None:
                looking.cancel()
        self.speed.learn(generation)
        return job.completed(
            self._id,
            text,
            generation.finish_reason,
            Usage(
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                total_tokens=generation.prompt_tokens + generation.completion_tokens,
            ),
            _timings(job, generation),
        )

    async def _stop_if_cancelled(self, job: Job) -> None:
        """Only a cancel that crossed with the delivery can have ended a job before its first run,
        and its result stands whatever the run comes to: this saves the work, and no more."""
        if await self._find_result(job) is not None:
            job.interrupt("cancelled")

    def _stopped(self, job: Job) -> Result | None:
        """What becomes of a job that was interrupted; None to hand it back."""
        if job.interruption is None or job.interruption == HANDED_BACK:
            return None
        return job.stopped(job.interruption, self._id)

    async def _settle(self, job: Job, result: Result) -> None:
        """Store the result, tell who waits, and only then take the message off the queue."""
        stored = await self._insist(lambda: store_result(self._broker, result, PATIENCE_S))
        await self._insist(lambda: self._reply(job, stored))
        if job.announced is not None:
            await job.announced
        await acknowledge(job.message)
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
            completion_tokens=usage.completion_tokens if usage else None,
            infer_ms=round(milliseconds_between(stored.started_at, stored.finished_at), 1)
            if stored.started_at
            else None,
        )

    async def _reply(self, job: Job, stored: Result) -> None:
        stream = job.malformed is None and job.request.stream
        await send_result(self._broker, stored, job.reply_to, stream)

    async def _return(self, job: Job) -> None:
        """Give an unfinished job back; it does not count as an attempt."""
        try:
            async with asyncio.timeout(RETURN_S):
                if job.announced is not None:
                    await job.announced
                await self._publish_state(job, "returned", patience_s=1)
        except (BrokerUnavailable, TimeoutError):
            log.warning("return_not_announced", job_id=job.id)
        await hand_back(job.message)
        log.info("job_returned", job_id=job.id, model=self.model, attempt=job.attempt)

    async def _bury(self, job: Job, code: str, message: str) -> Result:
        letter = DeadLetter(
            id=job.id,
            model=self.model,
            code=code,
            message=message,
            attempts=job.attempt - 1,
            at=timestamp(),
            request=job.message.data.decode("utf-8", "replace"),
        )
        payload = encode(letter)
        if len(payload) > self._broker.max_body:
            # Bytes that are no text take up to six times their room when they are shown.
            beginning = letter.request[: self._broker.max_body // WORST_ESCAPE // 2]
            payload = encode(msgspec.structs.replace(letter, request=beginning))
        await self._insist(
            lambda: self._broker.publish_stored(
                subjects.dead(self.model, job.id),
                payload,
                {subjects.HEADER_MSG_ID: f"{job.id}/dead"},
                PATIENCE_S,
            )
        )
        return job.buried(code, message)

    async def _publish_state(
        self, job: Job, state: Literal["started", "returned"], patience_s: float
    ) -> PubAck:
        at = timestamp() if state == "returned" else job.started_at or timestamp()
        event = StateEvent(state=state, attempt=job.attempt, at=at, inferer=self._id, work=job.work)
        return await self._broker.publish_stored(
            subjects.state_events(job.id),
            encode(event),
            {subjects.HEADER_MSG_ID: f"{job.id}/{state}/{job.attempt}/{at}"},
            patience_s,
        )

    async def _find_result(self, job: Job) -> Result | None:
        return await self._insist(lambda: read_result(self._broker, job.id))

    async def _last_state(self, job: Job) -> StateEvent | None:
        stored = await self._insist(
            lambda: self._broker.direct_get(
                subjects.EVENTS, last_by_subj=subjects.state_events(job.id)
            )
        )
        try:
            return None if stored is None else decode_state_event(stored.data)
        except msgspec.DecodeError:
            return None  # put there by hand

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make ``call`` until the broker answers, and has room: what a job became must not be
        lost."""
        told = False
        while True:
            try:
                return await call()
            except BrokerUnavailable as error:
                if not told:
                    log.warning("broker_awaited", error=error.message)
                    told = True
                await asyncio.sleep(RETRY_DELAY_S)

    async def _hear_cancel(self, message: Msg) -> None:
        job = self._jobs.get(subjects.last_token(message.subject))
        if job is None:
            return
        try:
            notice = decode_cancel_notice(message.data)
        except ValueError:
            notice = CancelNotice(code="cancelled")
        job.interrupt(notice.code)


def _timings(job: Job, generation: Generation) -> Timings:
    assert job.started_at is not None
    return Timings(
        queued_ms=milliseconds_between(job.queued_at, job.started_at),
        prompt_ms=generation.prompt_ms,
        first_token_ms=generation.prompt_ms,
        generation_ms=generation.generation_ms,
        tokens_per_s=(generation.completion_tokens - 1) / (generation.generation_ms / 1000)
        if generation.completion_tokens > 1
        else None,
    )
