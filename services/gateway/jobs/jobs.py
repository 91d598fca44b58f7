"""What a gateway can do with jobs. It keeps no state: every answer comes from the broker."""

import asyncio
import secrets
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

from services.gateway.eta.forecast import Forecast
from services.gateway.jobs.accepted import AcceptedJob, format_in
from services.gateway.jobs.admission import Admission
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.cancellation import Cancellation
from services.gateway.jobs.idempotency_record import IdempotencyRecord
from services.gateway.jobs.kept_requests import KeptRequests
from services.gateway.jobs.preview import preview_of
from services.gateway.jobs.withdrawals import Withdrawals
from services.gateway.settings import GatewaySettings
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import (
    MayHaveStarted,
    PendingJob,
    find_message,
    find_pending_job,
)
from services.gateway.state.result_listener import ResultListener
from services.gateway.state.storage import Storage
from services.gateway.validation.inputs import check_result_fits, result_bytes
from services.gateway.validation.limits import check_submission, clamped, logprob_bytes
from services.gateway.validation.schemas import Schemas
from shared.background import Tasks
from shared.broker.connection import Broker
from shared.broker.consumers import ModelConsumers, oldest_waiting_s
from shared.broker.results import find_result, read_result
from shared.broker.stored_messages import StoredMessage
from shared.errors import (
    AlreadyFinished,
    BrokerUnavailable,
    JobAgedOut,
    RequestTooLarge,
    SluiceError,
    StateChanged,
    StorageShort,
    StreamRefused,
    UnknownJob,
)
from shared.job_ids import has_aged_out, is_job_id, new_job_id
from shared.logs import logger
from shared.model_names import is_token, token_of
from shared.prompt_prefixes import fingerprints
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.answers import AnswerFormat
from shared.wire.api import ClassQueue, JobStatus, ModelQueue, QueueReport, Submission, TaskState
from shared.wire.codecs import encode
from shared.wire.nearest import NearestInferer
from shared.wire.requests import TEXT_TASKS, InferenceRequest, ModelRequest
from shared.wire.results import Cancelled, Result, StopCode

READ_AGAIN_S = 5.0
"""An announcement can be lost with a connection or a leader; the stored result cannot."""

FIRST_READ_AFTER_S = 0.25
"""An announcement between submit and the first wait would be missed; it costs this delay."""

log = logger()


class Jobs:
    """Submit, find, wait, cancel, count."""

    def __init__(
        self,
        broker: Broker,
        fleet: Fleet,
        results: ResultListener,
        forecast: Forecast,
        storage: Storage,
        kept_requests: KeptRequests,
        settings: GatewaySettings,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._results = results
        self._forecast = forecast
        self._storage = storage
        self._kept_requests = kept_requests
        self._settings = settings
        self._cancellation = Cancellation(broker, settings.patience_s)
        self._admission = Admission(fleet, forecast, settings.max_waiting)
        self._schemas = Schemas()
        self._cancelling = Tasks()
        self._withdrawals = Withdrawals(broker, self._cancellation, self._cancelling)

    async def submit(
        self,
        submission: Submission,
        caller: Caller,
        reply_to: str | None = None,
        record: IdempotencyRecord | None = None,
    ) -> AcceptedJob:
        """Accept a job: when this returns the broker holds it, and it will have a result.

        With the ``record`` of a key, the job gets the id that the key stands for, if any. The
        record is written after all checks that can refuse the job.

        Raises:
            InvalidRequest, RequestTooLarge, UnknownModel: it cannot run.
            QueueFull: too many wait already.
            Overloaded: too many schemas are being checked.
            StorageShort: the broker has too little room.
            StreamRefused: the configuration of the queue does not allow this message.
            BrokerUnavailable: the broker did not confirm it, but it may have arrived. It is
                withdrawn as soon as possible, unless the client may repeat it with its key.
            Overtaken: another gateway has used the key meanwhile.
        """
        self._storage.require_room()
        model, submission = await self._checked(submission, caller)
        now = self._broker.now()
        timeout_s = submission.timeout_s or self._settings.default_timeout_s
        accepted = AcceptedJob(
            id=(record and record.job_id) or new_job_id(now),
            model=model.name,
            priority=submission.priority,
            queued_at=timestamp(now),
            deadline=now + timedelta(seconds=timeout_s),
            task=submission.task,
            caller=caller,
            survives_disconnect=record is not None,
            format=format_in(submission, model.facts),
        )
        headers = {
            **caller.trace,
            subjects.HEADER_MSG_ID: accepted.id,
            subjects.HEADER_VERSION: subjects.WIRE_VERSION,
            subjects.HEADER_DEADLINE: timestamp(accepted.deadline),
        }
        if reply_to is not None:
            headers[subjects.HEADER_REPLY_TO] = reply_to
        if nearest := self._nearest(submission, model, caller):
            headers[subjects.HEADER_NEAREST] = nearest.header()
        payload = self._encode(submission, accepted)
        if not self._broker.is_connected:
            raise BrokerUnavailable("the connection to the broker is down")
        # Log probabilities are stored with the tokens, and once more in the result.
        size = len(payload) + 2 * logprob_bytes(submission) + result_bytes(submission, model.facts)
        is_kept = self._is_kept(submission)
        size += len(payload) * is_kept
        async with self._admission.reserved(model), self._storage.reserved(size):
            was_there = await self._publish(accepted, payload, headers, record)
        if is_kept and not was_there:
            await self._kept_requests.keep(accepted, payload)
        if record is not None and was_there:
            # Without a record it would be a retry of our own: nobody else knows the id.
            accepted = replace(accepted, is_replay=True)
        event = "request_repeated" if accepted.is_replay else "request_accepted"
        log.info(
            event, job_id=accepted.id, model=accepted.model, via=caller.via, bytes=len(payload)
        )
        return accepted

    async def check(self, submission: Submission, caller: Caller) -> None:
        """Refuse a job that `submit` would refuse as invalid.

        Raises:
            InvalidRequest, UnknownModel: it cannot run.
            Overloaded: too many schemas are being checked.
        """
        await self._checked(submission, caller)

    async def _checked(
        self, submission: Submission, caller: Caller
    ) -> tuple[ModelConsumers, Submission]:
        """The model of a submission, and the submission as it will be stored."""
        model = await self._fleet.choose(submission.model)
        if caller.via == "openai":
            submission = clamped(submission, model.facts)
        check_submission(submission, model.facts)
        check_result_fits(submission, model.facts, self._broker.max_body)
        await self._schemas.check(submission)
        return model, submission

    def answer_format(self, model: str, submission: ModelRequest) -> AnswerFormat:
        """How the answer to a submission is written, as far as that is known now."""
        known = self._fleet.models.get(token_of(model))
        return format_in(submission, known.facts if known else None)

    def _nearest(
        self, submission: Submission, model: ModelConsumers, caller: Caller
    ) -> NearestInferer | None:
        """The inferer that should get the job, if it is free."""
        if not submission.cache_prompt or len(self._fleet.inferers(model.token)) < 2:
            return None
        found = fingerprints(caller.owner, submission)
        return self._fleet.nearest(model.token, found)

    async def _publish(
        self,
        accepted: AcceptedJob,
        payload: bytes,
        headers: dict[str, str],
        record: IdempotencyRecord | None,
    ) -> bool:
        """Publish the job. Returns whether the broker already had it."""
        subject = subjects.request(
            accepted.model, accepted.id, accepted.priority, accepted.caller.owner
        )
        patience_s = self._settings.patience_s
        held = record.held(self._broker, accepted.id, patience_s) if record else nullcontext()
        try:
            async with held:
                stored = await self._broker.publish_stored(subject, payload, headers, patience_s)
        except (StorageShort, StreamRefused):
            raise
        except BrokerUnavailable as error:
            # It may have arrived all the same, or be on its way to a broker that hangs.
            unknown = f"it is not known whether job {accepted.id} was accepted: {error.message}"
            if accepted.survives_disconnect:
                raise BrokerUnavailable(
                    f"{unknown}; send it again with the same key; it will not run twice"
                ) from error
            self._withdrawals.withdraw(accepted)
            raise BrokerUnavailable(
                f"{unknown}; it is cancelled as soon as the broker answers, unless it has already "
                "ended"
            ) from error
        return stored.duplicate

    async def find(
        self, job_id: str, may_have_started: MayHaveStarted | None = None
    ) -> Result | PendingJob:
        """The job's result, or the job as it waits or runs. See `find_pending_job`.

        A job whose deadline has passed while it waited is expired here, if nobody did it before.

        Raises:
            UnknownJob, JobAgedOut, BrokerUnavailable.
        """
        if not is_job_id(job_id):
            raise UnknownJob(f"{job_id!r} is not a job id")
        # A replica may lag behind its leader, which is asked before anything is called unknown.
        for from_leader in (False, True):
            result = await self._find_result(job_id, from_leader)
            if result is not None:
                return result
            job = await find_pending_job(
                self._broker, job_id, from_leader=from_leader, may_have_started=may_have_started
            )
            if job is not None:
                late = job.is_late(self._broker.now())
                return await self._cancellation.stop(job, job.lateness) if late else job
        # It may have finished between the two reads.
        result = await find_result(self._broker, job_id, from_leader=True)
        if result is not None:
            return result
        if has_aged_out(job_id, self._broker.now()):
            raise JobAgedOut(f"the job {job_id} is older than results are kept (48 h)")
        raise UnknownJob(f"no job {job_id}")

    async def _find_result(self, job_id: str, from_leader: bool) -> Result | None:
        """The result, unless the job is on the queue of another model than that of the result."""
        result = await find_result(self._broker, job_id, from_leader=from_leader)
        if result is None:
            return None
        get = self._broker.leader_get if from_leader else self._broker.direct_get
        message = await find_message(get, job_id)
        if message is None:
            return result
        model = message.subject.split(".")[2]
        if model == token_of(result.model):
            return result
        return await read_result(self._broker, model, job_id)

    async def status(self, job_id: str) -> JobStatus:
        """Like `find`, in the form of ``/status``, with position, progress and ETA, or why the
        job cannot start."""
        model: ModelConsumers | None = None

        async def may_have_started(
            request: subjects.RequestSubject, message: StoredMessage
        ) -> bool:
            nonlocal model
            model = (await self._fleet.queues()).get(request.model)
            was_delivered = model is None or model.was_delivered(request, message)
            return was_delivered or self._forecast.knows_of(request.job_id)

        job = await self.find(job_id, may_have_started)
        if not isinstance(job, PendingJob):
            return JobStatus.of(job)
        estimate = await self._forecast.estimate(job, model)
        return estimate.added_to(job.status())

    async def brief_status(self, job_id: str) -> JobStatus:
        """Like `status`, without estimates."""
        job = await self.find(job_id)
        return job.status() if isinstance(job, PendingJob) else JobStatus.of(job)

    async def wait(self, job_id: str, accepted: AcceptedJob | None = None) -> Result:
        """The job's result, however long it takes; through outages of the broker too.

        With ``accepted``, for a job that was just published, the first read is delayed: nearly
        always the announcement comes first.

        Raises:
            UnknownJob, JobAgedOut.
        """
        if accepted is None:
            job = await self._broker.through_outages(partial(self.find, job_id))
            if not isinstance(job, PendingJob):
                return job
            model, deadline = job.model, job.deadline
        else:
            model, deadline = accepted.model, accepted.deadline
        read = deadline is None or accepted is None
        while True:
            with self._results.expecting(model, job_id) as announced:
                try:
                    found = await self.find(job_id) if read else None
                    if isinstance(found, PendingJob):
                        deadline = found.deadline
                    elif found is not None:
                        return found
                except BrokerUnavailable:
                    pass
                except UnknownJob:
                    if not self.runs(job_id):
                        raise
                pause_s = self._pause_s(deadline) if read else FIRST_READ_AFTER_S
                await asyncio.wait((announced,), timeout=pause_s)
                if announced.done() and (result := announced.result()) is not None:
                    return result
            read = True

    def runs(self, job_id: str) -> bool:
        """See `Forecast.runs`."""
        return self._forecast.runs(job_id)

    async def cancel(
        self,
        job_id: str,
        code: StopCode = "cancelled",
        states: Collection[TaskState] | None = None,
    ) -> JobStatus:
        """Cancel a job that waits or runs, if given, in one of ``states``; harmless to repeat.

        Raises:
            StateChanged: it waits or runs, but is in another state.
            AlreadyFinished: it has another result.
            UnknownJob, JobAgedOut, BrokerUnavailable.
        """
        job = await self.find(job_id)
        if isinstance(job, PendingJob):
            if states is not None and (now := job.status().state) not in states:
                raise StateChanged(f"the job {job_id} is {now} by now, and was not cancelled")
            job = await self._cancellation.stop(job, code)
        elif isinstance(job, Cancelled):
            # The gateway that cancelled it may have been cut off before it was done.
            await self._cancellation.notify(job.model, job.id, code)
            left = await find_pending_job(self._broker, job_id)
            if left is not None:
                await self._cancellation.finish(left, job)
        if not isinstance(job, Cancelled):
            state = JobStatus.of(job).state
            raise AlreadyFinished(
                f"the job {job_id} has already ended, with the state {state}", state
            )
        return JobStatus.of(job)

    def abandon(self, job_id: str, code: StopCode = "client_disconnected") -> None:
        """Cancel, in the background and through outages, a job that nobody waits for any more."""
        self._cancelling.start(self._abandon(job_id, code), f"abandon {job_id}")

    async def end(self, patience_s: float) -> None:
        """Cancel what is to be cancelled in the background, as far as the broker answers within
        ``patience_s``."""
        self._withdrawals.end()
        self._schemas.close()
        if left := await self._cancelling.end(patience_s):
            log.warning("jobs_not_cancelled", left=left)

    async def queue(self) -> QueueReport:
        """The queue of every model."""
        await self._fleet.refresh()
        models = [model for _, model in sorted(self._fleet.models.items())]
        return QueueReport(models=[await self._model_queue(model) for model in models])

    async def _abandon(self, job_id: str, code: StopCode) -> None:
        cancel = partial(self.cancel, job_id, code)
        try:
            await self._broker.through_outages(cancel)
        except SluiceError as error:
            log.info("job_not_abandoned", job_id=job_id, why=error.message)
        else:
            log.info("job_abandoned", job_id=job_id)

    async def _model_queue(self, model: ModelConsumers) -> ModelQueue:
        inferers = self._fleet.inferers(model.token)
        return ModelQueue(
            model=model.name,
            waiting=model.waiting,
            in_flight=model.in_flight,
            limit=model.limit,
            inferers=len(inferers),
            slots=sum(entry.slots for entry in inferers),
            oldest_s=await oldest_waiting_s(self._broker, model),
            max_waiting=self._admission.bound,
            classes={
                priority: ClassQueue(
                    waiting=info.num_pending or 0, in_flight=info.num_ack_pending or 0
                )
                for priority, info in model.by_priority.items()
            },
        )

    def _pause_s(self, deadline: datetime | None) -> float:
        if deadline is None:
            return READ_AGAIN_S
        left = (deadline - self._broker.now()).total_seconds()
        return min(READ_AGAIN_S, max(left, 0.25))

    def _is_kept(self, submission: Submission) -> bool:
        return submission.keeps_request and self._kept_requests.are_kept

    def _encode(self, submission: Submission, accepted: AcceptedJob) -> bytes:
        shared = {
            name: getattr(submission, name)
            for name in InferenceRequest.__struct_fields__
            if hasattr(submission, name)
        }
        # Fixed here, so that a second attempt comes out the same.
        shared["model"] = None if is_token(accepted.model) else accepted.model
        if submission.seed is None and submission.task in TEXT_TASKS:
            shared["seed"] = secrets.randbits(31)
        request = InferenceRequest(
            **shared,
            queued_at=accepted.queued_at,
            via=accepted.caller.via,
            preview=preview_of(submission) if self._is_kept(submission) else "",
            says_sampling=submission.task in TEXT_TASKS,
        )
        payload = encode(request)
        if len(payload) > self._broker.max_body:
            raise RequestTooLarge(
                f"the request has {len(payload)} bytes, more than the broker accepts "
                f"({self._broker.max_body}); send a smaller one"
            )
        return payload
