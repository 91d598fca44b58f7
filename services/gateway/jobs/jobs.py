"""What a gateway can do with jobs. It holds nothing: every answer comes from the broker."""

import asyncio
import secrets
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta

from services.gateway.eta.forecast import Forecast
from services.gateway.jobs.accepted import Ticket
from services.gateway.jobs.admission import Admission
from services.gateway.jobs.cancellation import Stopping
from services.gateway.jobs.idempotency_record import Claim
from services.gateway.jobs.withdrawals import Withdrawals
from services.gateway.settings import GatewaySettings
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import Unfinished, find_unfinished
from services.gateway.state.result_listener import FinishedJobs
from services.gateway.state.storage import Storage
from services.gateway.validation.limits import check_submission
from shared.background import Tasks
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.consumers import ModelConsumers, oldest_waiting_s
from shared.broker.results import read_result
from shared.errors import (
    AlreadyFinished,
    BrokerUnavailable,
    JobAgedOut,
    RequestTooLarge,
    SluiceError,
    StorageShort,
    StreamRefused,
    UnknownJob,
)
from shared.job_ids import has_aged_out, is_job_id, new_job_id
from shared.logs import logger
from shared.model_names import is_token
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import ClassQueue, JobStatus, JobSubmission, ModelQueue, QueueReport
from shared.wire.codecs import encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import Cancelled, Result, StopCode

LOOK_AGAIN_S = 5.0
"""An announcement can be lost with a connection or a leader; the stored result cannot."""

FIRST_LOOK_AFTER_S = 0.25
"""An announcement between submit and the first wait would be missed; this is what it would cost."""

log = logger()


class Jobs:
    """Submit, find, wait, cancel, count."""

    def __init__(
        self,
        broker: Broker,
        fleet: Fleet,
        finished: FinishedJobs,
        forecast: Forecast,
        storage: Storage,
        settings: GatewaySettings,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._finished = finished
        self._forecast = forecast
        self._storage = storage
        self._settings = settings
        self._stopping = Stopping(broker, settings.patience_s)
        self._admission = Admission(fleet, forecast, settings.max_waiting)
        self._cancelling = Tasks()
        self._withdrawals = Withdrawals(broker, self._stopping, self._cancelling)

    async def submit(
        self,
        submission: JobSubmission,
        reply_to: str | None = None,
        claim: Claim | None = None,
    ) -> Ticket:
        """Accept a job: when this returns the broker holds it, and it will have a result.

        With the ``claim`` to a key, as the job that the key stands for, or will: it is written to
        the key's entry after everything else that can refuse the job.

        Raises:
            InvalidRequest, RequestTooLarge, UnknownModel: it cannot run.
            QueueFull: too many wait already.
            StorageShort: the broker has too little room.
            StreamRefused: the queue takes no such message, as somebody has set it up.
            BrokerUnavailable: the broker did not confirm it. It is withdrawn as soon as possible,
                in case it arrived all the same; unless somebody may come back with its key.
            Overtaken: somebody else has used the claim's key meanwhile.
        """
        self._storage.require_room()
        model = await self._fleet.choose(submission.model)
        check_submission(submission, model.facts)
        now = self._broker.now()
        timeout_s = submission.timeout_s or self._settings.default_timeout_s
        ticket = Ticket(
            id=(claim and claim.job_id) or new_job_id(now),
            model=model.name,
            priority=submission.priority,
            queued_at=timestamp(now),
            deadline=now + timedelta(seconds=timeout_s),
            chat=submission.messages is not None,
            kept=claim is not None,
        )
        headers = {
            subjects.HEADER_MSG_ID: ticket.id,
            subjects.HEADER_VERSION: subjects.WIRE_VERSION,
            subjects.HEADER_DEADLINE: timestamp(ticket.deadline),
        }
        if reply_to is not None:
            headers[subjects.HEADER_REPLY_TO] = reply_to
        payload = self._encode(submission, ticket)
        if not self._broker.is_connected:
            raise BrokerUnavailable("the connection to the broker is down")
        async with self._admission.reserved(model), self._storage.reserved(len(payload)):
            was_there = await self._publish(ticket, payload, headers, claim)
        if claim is not None and was_there:
            # Without a claim it would be a retry of our own: nobody else knows the id.
            ticket = replace(ticket, repeated=True)
        event = "request_repeated" if ticket.repeated else "request_accepted"
        log.info(event, job_id=ticket.id, model=ticket.model, bytes=len(payload))
        return ticket

    async def _publish(
        self, ticket: Ticket, payload: bytes, headers: dict[str, str], claim: Claim | None
    ) -> bool:
        """Whether the broker had the job before."""
        subject = subjects.request(ticket.model, ticket.id, ticket.priority)
        patience_s = self._settings.patience_s
        held = claim.held(self._broker, ticket.id, patience_s) if claim else nullcontext()
        try:
            async with held:
                stored = await self._broker.publish_stored(subject, payload, headers, patience_s)
        except (StorageShort, StreamRefused):
            raise
        except BrokerUnavailable as error:
            # It may have arrived all the same, or be on its way to a broker that hangs.
            unknown = f"whether the job {ticket.id} was accepted is not known: {error.message}"
            if ticket.kept:
                raise BrokerUnavailable(
                    f"{unknown}; send it again with the same key; it will not run twice"
                ) from error
            self._withdrawals.withdraw(ticket)
            raise BrokerUnavailable(
                f"{unknown}; it is cancelled as soon as the broker answers, unless it has already "
                "ended"
            ) from error
        return bool(stored.duplicate)

    async def find(self, job_id: str) -> Result | Unfinished:
        """The job's result, or the job as it waits or runs.

        A job whose deadline has passed while it waited is expired here, if nobody did it before.

        Raises:
            UnknownJob, JobAgedOut, BrokerUnavailable.
        """
        if not is_job_id(job_id):
            raise UnknownJob(f"{job_id!r} is not a job id")
        # A replica may lag behind its leader, which is asked before anything is called unknown.
        for from_leader in (False, True):
            result = await read_result(self._broker, job_id, from_leader=from_leader)
            if result is not None:
                return result
            job = await find_unfinished(self._broker, job_id, from_leader=from_leader)
            if job is not None:
                late = job.is_late(self._broker.now())
                return await self._stopping.stop(job, job.lateness) if late else job
        # It may have finished between the two looks.
        result = await read_result(self._broker, job_id, from_leader=True)
        if result is not None:
            return result
        if has_aged_out(job_id, self._broker.now()):
            raise JobAgedOut(f"the job {job_id} is older than results are kept (48 h)")
        raise UnknownJob(f"no job {job_id}")

    async def status(self, job_id: str) -> JobStatus:
        """As `find`, in the words of ``/status``, with where it is and when it will be done."""
        job = await self.find(job_id)
        if not isinstance(job, Unfinished):
            return JobStatus.of(job)
        estimate = await self._forecast.estimate(job)
        return estimate.added_to(job.status())

    async def wait(self, job_id: str, ticket: Ticket | None = None) -> Result:
        """The job's result, however long it takes; through outages of the broker too.

        With the ``ticket`` of a job that was published just now the first look can wait: nearly
        always the announcement comes before it.

        Raises:
            UnknownJob, JobAgedOut.
        """
        deadline = ticket.deadline if ticket else None
        look = deadline is None
        while True:
            with self._finished.expecting(job_id) as announced:
                try:
                    found = await self.find(job_id) if look else None
                    if isinstance(found, Unfinished):
                        deadline = found.deadline
                    elif found is not None:
                        return found
                except BrokerUnavailable:
                    pass
                except UnknownJob:
                    if not self._fleet.runs(job_id):
                        raise
                pause_s = self._pause_s(deadline) if look else FIRST_LOOK_AFTER_S
                await asyncio.wait((announced,), timeout=pause_s)
                if announced.done() and (result := announced.result()) is not None:
                    return result
            look = True

    async def cancel(self, job_id: str, code: StopCode = "cancelled") -> JobStatus:
        """Cancel a job that waits or runs; harmless to repeat.

        Raises:
            AlreadyFinished: it has another result.
            UnknownJob, JobAgedOut, BrokerUnavailable.
        """
        job = await self.find(job_id)
        if isinstance(job, Unfinished):
            job = await self._stopping.stop(job, code)
        elif isinstance(job, Cancelled):
            # Whoever did it may have been cut off before it was done.
            await self._stopping.notify(job.id, code)
            left = await find_unfinished(self._broker, job_id)
            if left is not None:
                await self._stopping.finish(left, job)
        if not isinstance(job, Cancelled):
            state = JobStatus.of(job).state
            raise AlreadyFinished(
                f"the job {job_id} has already ended, with the state {state}", state
            )
        return JobStatus.of(job)

    def abandon(self, job_id: str) -> None:
        """Cancel, in the background and through outages, a job that nobody waits for any more."""
        self._cancelling.start(self._abandon(job_id), f"abandon {job_id}")

    async def end(self, patience_s: float) -> None:
        """Cancel what is to be cancelled in the background, as far as the broker answers within
        ``patience_s``."""
        self._withdrawals.end()
        if left := await self._cancelling.end(patience_s):
            log.warning("jobs_not_cancelled", left=left)

    async def queue(self) -> QueueReport:
        """The queue of every model."""
        await self._fleet.refresh()
        models = [model for _, model in sorted(self._fleet.models.items())]
        return QueueReport(models=[await self._model_queue(model) for model in models])

    async def _abandon(self, job_id: str) -> None:
        while True:
            try:
                await self.cancel(job_id, "client_disconnected")
                log.info("job_abandoned", job_id=job_id)
                return
            except BrokerUnavailable:
                await self._broker.until_connected()
                await asyncio.sleep(RETRY_DELAY_S)
            except SluiceError as error:
                log.info("job_not_abandoned", job_id=job_id, why=error.message)
                return

    async def _model_queue(self, model: ModelConsumers) -> ModelQueue:
        return ModelQueue(
            model=model.name,
            waiting=model.waiting,
            in_flight=model.in_flight,
            limit=model.limit,
            inferers=len(self._fleet.inferers.get(model.token, [])),
            oldest_s=await oldest_waiting_s(self._broker, model),
            max_waiting=self._admission.bound,
            classes={
                job_class: ClassQueue(
                    waiting=info.num_pending or 0, in_flight=info.num_ack_pending or 0
                )
                for job_class, info in model.by_class.items()
            },
        )

    def _pause_s(self, deadline: datetime | None) -> float:
        if deadline is None:
            return LOOK_AGAIN_S
        left = (deadline - self._broker.now()).total_seconds()
        return min(LOOK_AGAIN_S, max(left, 0.25))

    def _encode(self, submission: JobSubmission, ticket: Ticket) -> bytes:
        shared = {
            name: getattr(submission, name)
            for name in InferenceRequest.__struct_fields__
            if hasattr(submission, name)
        }
        # Fixed here, so that a second attempt comes out the same.
        shared["model"] = None if is_token(ticket.model) else ticket.model
        shared["seed"] = secrets.randbits(31) if submission.seed is None else submission.seed
        request = InferenceRequest(**shared, queued_at=ticket.queued_at)
        payload = encode(request)
        if len(payload) > self._broker.max_body:
            raise RequestTooLarge(
                f"the request has {len(payload)} bytes, the broker takes {self._broker.max_body}"
            )
        return payload
