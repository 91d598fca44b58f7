"""Responses (of OpenAI's Responses API) as they are stored: as a job's request and result."""

import asyncio
from dataclasses import dataclass

from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.kept_requests import KeptRequests
from services.gateway.state.pending_job import PendingJob, find_message
from shared.broker.connection import Broker
from shared.errors import BrokerUnavailable, InvalidRequest, JobAgedOut, UnknownJob, UnknownResponse
from shared.wire import subjects
from shared.wire.codecs import decode_request
from shared.wire.requests import InferenceRequest
from shared.wire.responses import ResponseForm
from shared.wire.results import Result

LEAVES_WITHIN_S = 5.0
"""How long a delete waits until a job that has ended leaves the queue."""
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class StoredResponse:
    """A response. ``request`` is None if it is not kept."""

    job: Result | PendingJob
    form: ResponseForm
    request: InferenceRequest | None


class StoredResponses:
    """Reads and deletes stored responses."""

    def __init__(self, broker: Broker, jobs: Jobs, kept_requests: KeptRequests) -> None:
        self._broker = broker
        self._jobs = jobs
        self._kept_requests = kept_requests

    @property
    def max_bytes(self) -> int:
        """Of the request of one."""
        return self._broker.max_body

    async def find(self, job_id: str, param: str = "response_id") -> StoredResponse:
        """The response with this job. ``param`` is the parameter that contains the id, for errors.

        Raises:
            UnknownResponse: the job is not a response, or is not stored or no longer stored.
            BrokerUnavailable: no answer.
        """
        unknown = f"{param}: there is no response resp_{job_id}"
        try:
            job = await self._jobs.find(job_id)
        except JobAgedOut:
            raise UnknownResponse(
                f"{unknown} any more; responses are kept for 48 hours", param
            ) from None
        except UnknownJob:
            raise UnknownResponse(unknown, param) from None
        if isinstance(job, PendingJob):
            request = job.request
            form = request.response if request else None
        else:
            kept = await self._kept_requests.find(job_id)
            request = decode_request.read(kept.data, kept.subject) if kept else None
            form = job.response or (request.response if request else None)
        if form is None:
            raise UnknownResponse(f"{unknown}: this job is not a response", param)
        if not form.store:
            raise UnknownResponse(f"{unknown}: it was created with `store: false`", param)
        return StoredResponse(job, form, request)

    def require_request(self, stored: StoredResponse, param: str) -> InferenceRequest:
        """The request of a response.

        Raises:
            UnknownResponse: it was deleted.
            InvalidRequest: this gateway keeps no requests.
        """
        if stored.request is not None:
            return stored.request
        if not self._kept_requests.are_kept:
            raise InvalidRequest(
                f"{param}: not possible, because this gateway does not keep the requests of "
                "responses that have ended (GATEWAY_KEEP_REQUESTS_H is 0); send the whole "
                "conversation as `input`",
                param,
            )
        raise UnknownResponse(f"{param}: the request of this response is no longer stored", param)

    async def delete(self, job_id: str) -> None:
        """Delete what is stored of a response that has ended: its result, events and request.

        Raises:
            InvalidRequest: it has not ended.
            UnknownResponse, BrokerUnavailable.
        """
        stored = await self.find(job_id)
        if isinstance(stored.job, PendingJob):
            raise InvalidRequest(
                "response_id: this response is queued or in progress; cancel it first",
                "response_id",
            )
        await self._wait_until_it_left(job_id)
        # The state stays. It contains no text, and its idempotency key must not run the job again.
        await self._kept_requests.delete(job_id)
        for stream, subject in (
            (subjects.EVENTS, subjects.events_of(job_id)),
            (subjects.DEAD, subjects.dead_of(job_id)),
            (subjects.RESULTS, subjects.result_of(job_id)),  # last: a delete can be repeated
        ):
            await self._broker.purge(stream, subject)

    async def _wait_until_it_left(self, job_id: str) -> None:
        """An inferer that still holds the job could store another result."""
        try:
            async with asyncio.timeout(LEAVES_WITHIN_S):
                while await find_message(self._broker.leader_get, job_id) is not None:
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise BrokerUnavailable(
                "the response has ended, but its job is still on the queue; try again"
            ) from None
