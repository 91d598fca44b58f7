"""What becomes of a delivered job: its result, or why it has none yet."""

import asyncio
import random
from datetime import timedelta

from msgspec.structs import replace

from services.inferer.crash.flight_recorder import Entry, FlightRecorder
from services.inferer.engine.embedding_engine import EmbeddingEngine, Pooled
from services.inferer.engine.generation import Generation
from services.inferer.engine.set_up import AnyEngine
from services.inferer.engine.speed import Speed
from services.inferer.worker.dead_letter import dead_letter
from services.inferer.worker.delivery import REQUEUED, Interrupted, Job, NoResult
from services.inferer.worker.inference import Inference
from services.inferer.worker.inputs import compute_inputs, embeddings, ranking
from services.inferer.worker.job_store import JobStore
from services.inferer.worker.retry_policy import Final, after_failure, pause_after
from services.inferer.worker.turns import Turns
from shared.background import Tasks, first_of
from shared.broker.connection import Broker
from shared.errors import (
    InvalidAnswer,
    InvalidRequest,
    ModelError,
    SluiceError,
    StreamRefused,
)
from shared.logs import logger
from shared.timestamps import milliseconds_between, timestamp
from shared.wire.requests import TEXT_TASKS
from shared.wire.results import (
    Choice,
    Completed,
    Failed,
    PromptTokensDetails,
    Result,
    Timings,
    Usage,
)

CHECK_AFTER_S = 0.1
"""Of a first delivery: most short jobs end before they are checked."""

log = logger()


class Executor:
    """One inferer's attempts at jobs: checks earlier ones, runs the job, and decides on retries."""

    def __init__(
        self,
        broker: Broker,
        engine: AnyEngine,
        store: JobStore,
        recorder: FlightRecorder,
        *,
        inferer_id: str,
        speed: Speed,
        max_attempts: int,
        retry_s: float,
    ) -> None:
        self._broker = broker
        self._engine = engine
        self._store = store
        self._recorder = recorder
        self._turns = Turns()
        self._checks = Tasks()
        self._id = inferer_id
        self._max_attempts = max_attempts
        self._retry_s = retry_s
        self._speed = speed
        self.missing_adapters: set[str] = set()
        """Adapters that jobs asked for in vain."""

    async def outcome(self, job: Job) -> Result | NoResult:
        """The job's result, an existing or a new one; or why it has none yet."""
        try:
            return await self._decide(job)
        except Exception as error:
            log.exception("job_crashed", job_id=job.id)
            return await self._fail(job, SluiceError(f"bug in the inferer: {error!r}"))

    async def _decide(self, job: Job) -> Result | NoResult:
        if not job.is_first_delivery:
            stored, last, is_scheduled = await asyncio.gather(
                self._store.result(job),
                self._store.last_state(job),
                self._store.is_scheduled(job),
            )
            if stored is not None:
                return stored
            if is_scheduled:
                return NoResult.RETRY_SCHEDULED
            job.count_attempt(last)
        if job.malformed is not None:
            return await self._store.result(job) or await self._dead_letter(
                job, job.dead_lettered(InvalidRequest.code, job.malformed)
            )
        if job.interruption is not None:
            return self._stopped(job)
        if job.is_late:
            return job.stopped("deadline_passed")
        if job.attempt > self._max_attempts:
            return await self._dead_letter(
                job, job.dead_lettered("worker_lost", self._why_lost(job))
            )
        if self.lacks_adapter(job):
            return await self._return_for_later(job)
        return await self._run_in_turn(job)

    def lacks_adapter(self, job: Job) -> bool:
        """Whether only another inferer of the model can run the job."""
        adapter, model = job.request.adapter, self._engine.model
        return adapter is not None and model.generates_text and adapter not in model.adapters

    def _why_lost(self, job: Job) -> str:
        known = job.crash.message if job.crash else None
        return f"attempt {job.attempt - 1} of {self._max_attempts} ended with its inferer" + (
            f": {known}" if known else "; the job may have killed it"
        )

    async def _run_in_turn(self, job: Job) -> Result | NoResult:
        """Run the job beside others; alone, if it may have killed its last inferer, so that other
        jobs complete and only the one at fault fails.

        It starts only when its turn has come: it would otherwise seem lost, too, if the job before
        it kills the inferer.
        """
        alone = job.crash is not None
        if not (self._turns.take_now(alone=alone) or await self._wait_for_turn(job, alone)):
            return self._stopped(job)
        try:
            return await self._run(job)
        finally:
            self._turns.leave()

    async def _wait_for_turn(self, job: Job, alone: bool) -> bool:
        """Returns whether the job has its turn; otherwise it was interrupted."""
        turn = asyncio.create_task(self._turns.take(alone=alone), name=f"turn of {job.id}")
        await first_of(turn, job.interrupting, timeout_s=job.seconds_left)
        if not turn.done():
            job.interrupt("deadline_passed")  # where it was not interrupted
            turn.cancel()
            await asyncio.wait((turn,))
        return not turn.cancelled()

    async def _run(self, job: Job) -> Result | NoResult:
        job.start(self._engine.n_ctx)
        # Created before the task that publishes tokens on the same connection, so readers see the
        # start first. The broker's answer is awaited only before the job leaves the queue.
        job.announced = asyncio.create_task(
            self._store.announce_start(job), name=f"announce {job.id}"
        )
        checking = None
        if job.is_first_delivery:
            checking = asyncio.get_running_loop().call_later(
                CHECK_AFTER_S,
                lambda: self._checks.start(self._stop_if_cancelled(job), "check for a cancel"),
            )
        else:
            # An unconfirmed start would not count as an attempt, and a job that kills its inferers
            # would never reach the limit of attempts.
            await job.announced
        entry = self._recorder.open(job.id, job.attempt, alone=job.crash is not None)
        try:
            return await self._complete(job, entry)
        except Interrupted:
            return self._stopped(job)
        except InvalidAnswer as error:
            return job.failed(error, self._id)
        except SluiceError as error:
            return await self._fail(job, error)
        finally:
            entry.close()
            if checking is not None:
                checking.cancel()

    async def _complete(self, job: Job, entry: Entry) -> Completed:
        """Run the attempt to its end.

        Raises:
            Interrupted: see ``job.interruption``.
            SluiceError: it failed.
        """
        model = self._engine.model
        if job.request.task not in (TEXT_TASKS if model.generates_text else model.tasks):
            tasks = " and ".join(f"`{task}`" for task in model.tasks)
            raise InvalidRequest(
                f"this model does not support the task `{job.request.task}`, only {tasks}; "
                "choose another one",
                "model",
            )
        if isinstance(self._engine, EmbeddingEngine):
            return await self._complete_inputs(self._engine, job, entry)
        generation, published = await Inference(self._broker, self._engine, job, entry).run()
        self._speed.learn(generation)
        choices = [
            Choice(
                text=written.text,
                finish_reason=ending.finish_reason,
                completion_tokens=ending.completion_tokens,
                logprobs=written.logprobs,
            )
            for ending, written in zip(generation.endings, published.written, strict=True)
        ]
        return job.completed(
            self._id,
            choices,
            _usage(generation),
            _timings(job, generation),
            self._engine.model.answer_format(job.request),
        )

    async def _complete_inputs(self, engine: EmbeddingEngine, job: Job, entry: Entry) -> Completed:
        pooled = await compute_inputs(engine, job, entry, self._broker.max_body)
        self._speed.learn(pooled)
        timings = replace(_timings(job, pooled), first_token_ms=None)
        no_text = Choice(text="", finish_reason="stop", completion_tokens=0)
        completed = job.completed(self._id, [no_text], _usage(pooled), timings)
        if job.request.task == "embed":
            return replace(completed, embeddings=embeddings(pooled))
        return replace(completed, ranking=ranking(job.request, pooled))

    async def _stop_if_cancelled(self, job: Job) -> None:
        """Only a cancel that crossed with the delivery can have ended a job before its first run,
        and its result stands whatever the run comes to: this saves the work, and no more."""
        if await self._store.result(job) is not None:
            job.interrupt("cancelled")

    def _stopped(self, job: Job) -> Result | NoResult:
        """What becomes of a job that was interrupted."""
        if job.interruption is None or job.interruption == REQUEUED:
            return NoResult.REQUEUED
        return job.stopped(job.interruption, self._id)

    async def _fail(self, job: Job, error: SluiceError) -> Result | NoResult:
        """What becomes of a job whose attempt has failed: the end, or another attempt later."""
        failed = job.failed(error, self._id)
        code, message = failed.code, failed.message
        pause_s = pause_after(job.attempt, self._retry_s, random.random())
        again_at = after_failure(
            code, job.attempt, self._max_attempts, self._broker.now(), job.deadline, pause_s
        )
        match again_at:
            case Final.FAILED:
                return failed
            case Final.DEAD_LETTERED:
                return await self._dead_letter(job, failed)
            case Final.EXPIRED:
                return job.out_of_time(self._id, message)
        if job.announced is not None:
            await job.announced
        try:
            # If this inferer dies after the first of these calls, the job is redelivered when its
            # lease expires, as the next attempt; after the second, by the lease or the schedule,
            # but not twice: the scheduled message replaces this one.
            await self._store.announce_retry(job, code, message)
            is_scheduled = await self._store.schedule(job, again_at)
        except StreamRefused as refused:
            log.warning("retry_refused", job_id=job.id, error=refused.message)
            return await self._dead_letter(job, failed)
        log.warning(
            "job_retry_scheduled" if is_scheduled else "job_retry_without_gateway",
            job_id=job.id,
            model=job.model,
            attempt=job.attempt,
            code=code,
            until=timestamp(again_at),
        )
        return NoResult.RETRY_SCHEDULED if is_scheduled else NoResult.RETRY_DELAYED

    async def _return_for_later(self, job: Job) -> NoResult:
        """Leave a job whose adapter is not here to an inferer that has it, until its deadline.

        It counts as no attempt: while the others are busy, all attempts would be made here, within
        seconds. The pauses grow, so that many such jobs do not keep this inferer busy.
        """
        adapter = job.request.adapter or ""
        message = (
            f"the inferer {self._id} has no adapter {adapter}, it has "
            f"{', '.join(self._engine.model.adapters) or 'none'}; give every inferer of this model "
            "the same adapters (INFERER_ADAPTERS), and restart them"
        )
        if adapter not in self.missing_adapters:
            self.missing_adapters.add(adapter)
            log.warning("adapter_missing", job_id=job.id, model=job.model, message=message)
        if job.crash is not None:
            # The crash stays the last that is known of the job, so that it runs alone.
            return NoResult.RETRY_DELAYED
        pause_s = pause_after(job.returns + 1, self._retry_s, random.random())
        again_at = self._broker.now() + timedelta(seconds=pause_s)
        if job.deadline is not None:
            again_at = min(again_at, job.deadline)
        try:
            await self._store.announce_return_for_later(job, ModelError.code, message)
            is_scheduled = await self._store.schedule(job, again_at)
        except StreamRefused as error:
            log.warning("retry_refused", job_id=job.id, error=error.message)
            return NoResult.RETRY_DELAYED
        return NoResult.RETRY_SCHEDULED if is_scheduled else NoResult.RETRY_DELAYED

    async def _dead_letter(self, job: Job, failed: Failed) -> Failed:
        """Store a dead letter, and return the result that says so. An existing letter stays, with
        the reason that was stored first."""
        letter = await self._store.dead_letter(job, dead_letter(job, failed, self._broker.now()))
        return replace(failed, code=letter.code, message=letter.message, attempt=letter.attempts)


def _usage(run: Generation | Pooled) -> Usage:
    return Usage(
        prompt_tokens=run.prompt_tokens,
        completion_tokens=run.completion_tokens,
        total_tokens=run.prompt_tokens + run.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(run.cached_tokens),
    )


def _timings(job: Job, generation: Generation | Pooled) -> Timings:
    assert job.started_at is not None
    return Timings(
        queued_ms=milliseconds_between(job.queued_at, job.started_at),
        prompt_ms=generation.prompt_ms,
        first_token_ms=generation.prompt_ms,
        total_ms=job.running_ms,
        generation_ms=generation.generation_ms,
        prompt_delay_ms=max(generation.prompt_delay_ms, 0.0),
        generation_delay_ms=max(generation.generation_delay_ms, 0.0),
        tokens_per_s=(generation.completion_tokens - 1) / (generation.generation_ms / 1000)
        if generation.completion_tokens > 1
        else None,
    )
