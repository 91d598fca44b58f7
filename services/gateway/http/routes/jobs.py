"""`/jobs` and `/status`: submit, list, status, events, cancel."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, JSONBody
from litestar.response import ServerSentEventMessage

from services.gateway.gateway import Gateway
from services.gateway.http.caller import caller_of
from services.gateway.http.connection import (
    ClientDisconnected,
    IdempotencyKey,
    require_connected,
    while_connected,
)
from services.gateway.http.document import EVENT_STREAM, ListOperation, StreamOperation
from services.gateway.http.errors import error_responses
from services.gateway.http.preferences import Preferences
from services.gateway.http.sse import COMMENT, GatewayStopping, OpenStreams, event_stream
from services.gateway.jobs.events import END, JobEvent
from services.gateway.validation.listing import parse_query
from shared.errors import BrokerUnavailable
from shared.wire.api import JobAccepted, JobStatus, JobSubmission
from shared.wire.codecs import encode
from shared.wire.listing import BulkReport, BulkRequest, JobDetails, JobPage


@post(
    "/jobs",
    status_code=202,
    responses={
        **error_responses(404, 410, 413, 422, 429),
        200: ResponseSpec(
            JobStatus, description="finished within `Prefer: wait=N`", generate_examples=False
        ),
    },
)
async def submit(
    request: Request[Any, Any, Any],
    data: JSONBody[JobSubmission],
    gateway: NamedDependency[Gateway],
    idempotency_key: IdempotencyKey = None,
) -> Response[JobAccepted | JobStatus]:
    """Submit a job. The response is sent once the broker has stored the job.

    With `Prefer: wait=N`, it waits up to N seconds for the result. If the client disconnects in the
    meantime, the job is cancelled, unless the client also sent `Prefer: respond-async` or an
    `Idempotency-Key`.
    """
    gateway.require_ready()
    preferences = Preferences.parse(request.headers.getall("prefer", []))
    survives_disconnect = preferences.respond_async or idempotency_key is not None
    if preferences.wait_s and not survives_disconnect:
        await require_connected(request)
    accepted = await gateway.idempotency.submit(data, caller_of(request), idempotency_key)
    location = {"location": f"/status/{accepted.id}"}
    if preferences.wait_s:
        waiting = gateway.jobs.wait(accepted.id, accepted)
        try:
            result = await while_connected(request, gateway.stopping, waiting, preferences.wait_s)
            headers = location | preferences.applied(is_finished=True)
            return Response(JobStatus.of(result), status_code=200, headers=headers)
        except ClientDisconnected:
            if not survives_disconnect:
                gateway.abandon(accepted.id)
            raise
        except (TimeoutError, GatewayStopping):
            pass
    headers = location | preferences.applied(is_finished=False)
    return Response(JobAccepted.of(accepted.id, accepted.state), status_code=202, headers=headers)


@get("/jobs", operation_class=ListOperation, responses=error_responses())
async def list_jobs(request: Request[Any, Any, Any], gateway: NamedDependency[Gateway]) -> JobPage:
    """Jobs that match all parameters, newest first: those that are waiting or running, and those
    that ended within the last 48 hours, up to `GATEWAY_HISTORY_JOBS`. `metadata.<name>`
    compares a member of the metadata, such as `metadata.user=u77`; if there are several, all must
    match.

    Jobs on the queue have a `position`, and the first 50 of each model an `eta`, as in `/status`.
    `total` is the number of matching jobs; `states` counts all jobs by state, regardless of the
    filter. If `cursor` is not null, another page follows.
    """
    gateway.require_ready()
    return await gateway.job_list.page(parse_query(request.query_params.multi_items()))


@get("/status/{job_id:str}", responses=error_responses(404, 410))
async def status(job_id: FromPath[str], gateway: NamedDependency[Gateway]) -> JobStatus:
    """The status of a job. `state` has Celery's names: PENDING, STARTED, RETRY, SUCCESS, FAILURE,
    REVOKED. If no inferer can start the job at present, `blocked_reason` says why, and what to do.
    """
    gateway.require_ready()
    return await gateway.jobs.status(job_id)


@get(
    "/jobs/{job_id:str}/events",
    operation_class=StreamOperation,
    responses={
        **error_responses(404, 410),
        200: ResponseSpec(
            str, description="the events", media_type=EVENT_STREAM, generate_examples=False
        ),
        204: ResponseSpec(None, description="after the last event"),
    },
)
async def events(
    request: Request[Any, Any, Any],
    job_id: FromPath[str],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    last_event_id: Annotated[str, HeaderParameter(name="Last-Event-ID", required=False)] = "",
) -> Response[Any]:
    """The job's events: `queued`, `started`, `tokens`, `result`; also `returned` (its inferer shut
    down and requeued it), `attempt_failed` (another attempt follows), `retrying` (the text starts
    again from the beginning), and `error` (the job was deleted from the broker and has no
    result). Resumes after `Last-Event-ID`, at any gateway. Disconnecting does not cancel it."""
    gateway.require_ready()
    if last_event_id == END:
        return Response(None, status_code=204)  # an EventSource does not reconnect after a 204
    await require_connected(request)
    streams.admit(request)
    feed = streams.read(gateway.events(job_id, last_event_id), request)
    try:
        first = await feed.next()  # an error about the id gets its own status here
    except GatewayStopping:
        raise BrokerUnavailable("this gateway is shutting down; try another one") from None

    async def messages() -> AsyncIterator[ServerSentEventMessage]:
        try:
            yield _message(first)
            async for event in feed.items():
                yield COMMENT if event is None else _message(event)
        except GatewayStopping:
            return  # the client reconnects to another gateway, with its Last-Event-ID

    return event_stream(messages())


@get("/jobs/{job_id:str}", responses=error_responses(404, 410))
async def details(job_id: FromPath[str], gateway: NamedDependency[Gateway]) -> JobDetails:
    """A job with its status, its request and its timeline."""
    gateway.require_ready()
    return await gateway.job_list.details(job_id)


@delete("/jobs/{job_id:str}", status_code=200, responses=error_responses(404, 409, 410))
async def cancel(job_id: FromPath[str], gateway: NamedDependency[Gateway]) -> JobStatus:
    """Cancel a waiting or running job. 409 if it has already ended."""
    gateway.require_ready()
    return await gateway.jobs.cancel(job_id)


@post("/jobs/cancel", status_code=200, responses=error_responses(413))
async def cancel_several(
    data: JSONBody[BulkRequest], gateway: NamedDependency[Gateway]
) -> BulkReport:
    """Cancel several jobs: those with these `ids`, or those that match `where`, the newest first.
    The fields of `where` are the filters of `GET /jobs`. An empty `where` is refused."""
    gateway.require_ready()
    return await gateway.bulk.cancel(data)


def _message(event: JobEvent) -> ServerSentEventMessage:
    return ServerSentEventMessage(
        id=event.id, event=event.event, data=encode(event.data).decode("utf-8")
    )
