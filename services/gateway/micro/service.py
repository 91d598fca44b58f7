"""The NATS micro service `sluice` (ADR-32): the gateway for NATS clients."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import nats.errors
import nats.micro
from msgspec import Struct
from nats.aio.client import Client
from nats.micro.request import Request, ServiceError

from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency import Idempotency
from services.gateway.jobs.job_list import JobList
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.retries import Retries
from services.gateway.micro.endpoints import Endpoint, EndpointSchemas, Handler
from services.gateway.micro.replies import Replies
from services.gateway.micro.requests import InFlight, Requests
from services.gateway.state.fleet import Fleet
from services.gateway.state.pending_job import PendingJob
from services.gateway.state.result_listener import ResultListener
from services.gateway.statuses import status_of
from services.gateway.validation.decode import decode_body
from shared import __version__
from shared.broker.connection import Broker
from shared.errors import InvalidRequest, NotFinished, RequestTooLarge, SluiceError
from shared.logs import logger
from shared.wire import subjects
from shared.wire.api import (
    ConcurrencyReport,
    ConcurrencyRequest,
    FleetReport,
    JobAccepted,
    JobReference,
    JobStatus,
    NatsSubmission,
    QueueReport,
)
from shared.wire.codecs import encode
from shared.wire.listing import JobPage, JobQuery
from shared.wire.requests import RetryRequest, RetryScheduled
from shared.wire.results import Result
from shared.wire.trace import trace_of

DESCRIPTION = "LLM inference, one job at a time through each worker"

LONGEST_DESCRIPTION = 1000
"""The maximum length of an error's description. It is a header, which the client does not count
against the server's limit, and it may quote the request."""

log = logger()


class NatsService:
    """Answers requests on ``infer.*``; for ``chat``, ``complete``, ``embed`` and
    ``rerank`` the inferer answers itself."""

    def __init__(
        self,
        broker: Broker,
        fleet: Fleet,
        jobs: Jobs,
        results: ResultListener,
        idempotency: Idempotency,
        retries: Retries,
        job_list: JobList,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._jobs = jobs
        self._idempotency = idempotency
        self._retries = retries
        self._job_list = job_list
        self._replies = Replies(broker, jobs, results)
        self._endpoints = {
            "chat": Endpoint(
                self._chat,
                "answer `messages`; with `stream` the tokens, the result, and an empty message",
                NatsSubmission,
                Result,
            ),
            "complete": Endpoint(
                self._complete, "continue a `prompt`; streams like chat", NatsSubmission, Result
            ),
            "embed": Endpoint(self._embed, "compute embeddings of `input`", NatsSubmission, Result),
            "rerank": Endpoint(
                self._rerank, "rank `documents` for a `query`", NatsSubmission, Result
            ),
            "submit": Endpoint(
                self._submit, "submit a job of any kind", NatsSubmission, JobAccepted
            ),
            "status": Endpoint(
                self._status,
                "state, position and ETA of a job",
                JobReference,
                JobStatus,
            ),
            "result": Endpoint(
                self._result, "result of a job that has ended", JobReference, Result
            ),
            "cancel": Endpoint(
                self._cancel,
                "cancel a job, waiting or running",
                JobReference,
                JobStatus,
            ),
            "jobs": Endpoint(
                self._list_jobs, "list jobs by state, model and more", JobQuery, JobPage
            ),
            "queue": Endpoint(
                self._queue, "waiting and running jobs of each model", response=QueueReport
            ),
            "inferers": Endpoint(
                self._inferers, "live inferers and the jobs they run", response=FleetReport
            ),
            "concurrency": Endpoint(
                self._concurrency,
                "set the slots of live inferers",
                ConcurrencyRequest,
                ConcurrencyReport,
            ),
            "schema": Endpoint(
                self._schema,
                "the JSON Schemas of an endpoint: nats req infer.schema chat",
                str,
                EndpointSchemas,
            ),
            "retry": Endpoint(
                self._retry,
                "for inferers only: schedule the next attempt of a job",
                RetryRequest,
                RetryScheduled,
            ),
        }

    @asynccontextmanager
    async def running(self, stopping: asyncio.Event, drain_s: float) -> AsyncIterator[None]:
        """Serve until ``stopping`` is set; requests that have arrived may take ``drain_s``."""
        requests = Requests(self._broker.nc)
        service = await nats.micro.add_service(
            cast(Client, requests),
            nats.micro.service.ServiceConfig(
                name="sluice", version=__version__, description=DESCRIPTION
            ),
        )
        for name, endpoint in self._endpoints.items():
            await service.add_endpoint(
                name=name,
                subject=subjects.RETRY_WILDCARD if name == "retry" else f"infer.{name}",
                handler=_answering(endpoint.handler),
                metadata=endpoint.metadata,
            )
        draining = asyncio.create_task(_drain_at(stopping, requests, drain_s), name="drain")
        try:
            yield
        finally:
            stopping.set()
            await draining
            await self._replies.stop()

    async def _chat(self, request: Request) -> None:
        submission = decode_body(request.data, NatsSubmission)
        if submission.messages is None:
            raise InvalidRequest("infer.chat takes `messages`; for a `prompt` use infer.complete")
        await self._converse(request, submission)

    async def _complete(self, request: Request) -> None:
        submission = decode_body(request.data, NatsSubmission)
        if submission.prompt is None and submission.prompt_tokens is None:
            raise InvalidRequest("infer.complete takes a `prompt`; for `messages` use infer.chat")
        await self._converse(request, submission)

    async def _embed(self, request: Request) -> None:
        submission = decode_body(request.data, NatsSubmission)
        if submission.input is None:
            raise InvalidRequest("infer.embed takes `input`", "input")
        await self._converse(request, submission)

    async def _rerank(self, request: Request) -> None:
        submission = decode_body(request.data, NatsSubmission)
        if submission.query is None:
            raise InvalidRequest("infer.rerank takes `query` and `documents`", "query")
        await self._converse(request, submission)

    async def _converse(self, request: Request, submission: NatsSubmission) -> None:
        reply_to = _reply_to(request)
        accepted = await self._idempotency.submit(
            submission, _caller(request), _key(request), reply_to
        )
        if accepted.is_replay:
            # The job in the queue names the inbox of the first caller, and inferers know no other.
            self._replies.send(accepted, reply_to, submission.stream)
        else:
            self._replies.watch(accepted, reply_to)

    async def _submit(self, request: Request) -> JobAccepted:
        submission = decode_body(request.data, NatsSubmission)
        if submission.stream:
            raise InvalidRequest("infer.submit does not stream; use infer.chat or infer.complete")
        accepted = await self._idempotency.submit(submission, _caller(request), _key(request))
        return JobAccepted.of(accepted.id, accepted.state)

    async def _status(self, request: Request) -> Struct:
        return await self._jobs.status(_job_id(request))

    async def _result(self, request: Request) -> Struct:
        job = await self._jobs.find(_job_id(request))
        if isinstance(job, PendingJob):
            raise NotFinished(f"the job {job.id} has no result yet: {job.status().state}")
        return job

    async def _cancel(self, request: Request) -> Struct:
        return await self._jobs.cancel(_job_id(request))

    async def _list_jobs(self, request: Request) -> Struct:
        return await self._job_list.page(decode_body(request.data or b"{}", JobQuery))

    async def _retry(self, request: Request) -> Struct:
        """Called by inferers, which do not publish to REQUESTS themselves."""
        model, job_id = subjects.model_and_id(request.subject)
        wanted = decode_body(request.data, RetryRequest)
        return await self._retries.schedule(model, job_id, wanted)

    async def _queue(self, request: Request) -> Struct:
        return await self._jobs.queue()

    async def _inferers(self, request: Request) -> Struct:
        return await self._fleet.report()

    async def _concurrency(self, request: Request) -> Struct:
        return await self._fleet.set_concurrency(decode_body(request.data, ConcurrencyRequest))

    async def _schema(self, request: Request) -> Struct:
        name = request.data.decode("utf-8", "replace").strip().removeprefix("infer.")
        if (endpoint := self._endpoints.get(name)) is None:
            names = ", ".join(self._endpoints)
            raise InvalidRequest(f"give the name of an endpoint: {names}")
        return EndpointSchemas.of(endpoint)


async def _drain_at(stopping: asyncio.Event, requests: Requests, patience_s: float) -> None:
    await stopping.wait()
    await requests.drain(patience_s)


def _answering(handler: Handler) -> Callable[[Request], Awaitable[None]]:
    """Wraps ``handler``: sends its answer, and turns its errors into service errors, which are
    counted.

    Requests are handled concurrently, up to a limit, so that no caller can exhaust the gateway.
    """
    in_flight = InFlight()

    async def handle(request: Request) -> None:
        try:
            with in_flight.admitted(len(request.data)):
                async with in_flight.turn:
                    answer = await handler(request)
                if answer is not None and request._msg.reply:
                    await _respond(request, encode(answer))
            return
        except SluiceError as error:
            description = f"{error.code}: {error.message}"[:LONGEST_DESCRIPTION]
            refusal = ServiceError(str(status_of(error)), description)
        except asyncio.CancelledError:
            refusal = ServiceError(
                "503",
                "broker_unavailable: this gateway is shutting down, and the broker has not "
                "answered in time; the request may have been accepted all the same",
            )
        except Exception:
            log.exception("nats_request_crashed", subject=request.subject)
            refusal = ServiceError("500", "internal_error: see the gateway's log")
        if request._msg.reply:
            raise refusal
        log.info("nats_request_refused", subject=request.subject, why=refusal.description)

    return handle


async def _respond(request: Request, answer: bytes) -> None:
    """Raises: RequestTooLarge: the answer does not fit into one message."""
    try:
        await request.respond(answer)
    except nats.errors.MaxPayloadError:
        raise RequestTooLarge(
            f"the answer has {len(answer)} bytes, more than the broker takes in one message; "
            "ask for it over HTTP"
        ) from None


def _caller(request: Request) -> Caller:
    return Caller("nats", trace=trace_of(request.headers))


def _key(request: Request) -> str | None:
    return (request.headers or {}).get(subjects.HEADER_IDEMPOTENCY_KEY)


def _reply_to(request: Request) -> str:
    reply: str = request._msg.reply
    if not reply:
        raise InvalidRequest("the request has no reply subject for the result; use infer.submit")
    return reply


def _job_id(request: Request) -> str:
    """The id in ``{"id": "…"}``, or bare, as a person types it."""
    bare = request.data.decode("utf-8", "replace").strip()
    if bare.startswith("{"):
        return decode_body(request.data, JobReference).id
    if not bare:
        raise InvalidRequest('give the id of a job, bare or as {"id": "…"}')
    return bare
