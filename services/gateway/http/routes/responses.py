"""`/v1/responses`: OpenAI's Responses API. Responses are jobs, and are read from the broker."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, get_args

from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import ServerSentEventMessage
from msgspec import Struct

from services.gateway.gateway import Gateway
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import IdempotencyKey, require_connected
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import openai_error_responses
from services.gateway.http.openai.exchange import Exchange, decides
from services.gateway.http.openai.failures import AsSent, failure, stopping
from services.gateway.http.openai.responses.body import ResponseBody
from services.gateway.http.openai.responses.conversation import conversation_of
from services.gateway.http.openai.responses.ids import job_of_response
from services.gateway.http.openai.responses.items import items_of
from services.gateway.http.openai.responses.requests import (
    Includable,
    ResponseRequest,
    ResponseSubmission,
)
from services.gateway.http.openai.responses.stream import (
    FIRST_OUTPUT,
    NumberedEvent,
    ResponseEvents,
    beyond_the_end,
    last_number,
)
from services.gateway.http.request import WITHOUT_EFFECT
from services.gateway.http.sse import (
    COMMENT,
    KEEP_ALIVE_S,
    BufferedStream,
    GatewayStopping,
    OpenStreams,
    event_stream,
)
from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import JobEvent
from services.gateway.jobs.stored_responses import StoredResponse
from services.gateway.state.pending_job import PendingJob
from shared.errors import AlreadyFinished, BrokerUnavailable, InvalidRequest, UnknownResponse
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Cancelled, Completed

ERRORS = openai_error_responses(404, 409, 410, 413, 422, 429, 504)
READ_ERRORS = openai_error_responses(404)
FIRST_TIME = -1
"""Instead of the number of the last event, for a client that has no events yet."""


class DeletedResponse(Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemPage(Struct, frozen=True, kw_only=True):
    """Items of a response's own input, without those of earlier responses."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


@post("/v1/responses", status_code=200, responses=ERRORS, operation_class=StreamOperation)
async def create(
    request: Request[Any, Any, Any],
    data: JSONBody[ResponseRequest],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    idempotency_key: IdempotencyKey = None,
) -> Response[ResponseBody]:
    """Create a response, as one body or as a stream. With `background`, it is returned at once.
    Otherwise, if the client disconnects before its timeout, its job is cancelled, unless it sent an
    `Idempotency-Key`."""
    data.check()
    exchange = Exchange(
        request,
        gateway,
        streams,
        idempotency_key,
        is_stream=bool(data.stream),
        is_background=bool(data.background),
    )
    await exchange.require_client()
    submission = data.submission(*await conversation_of(data, gateway.responses))
    try:
        await exchange.accept([submission])
    except InvalidRequest as error:
        raise data.as_sent(error) from None
    (accepted,) = exchange.jobs
    queued = ResponseBody.queued(
        job_id=accepted.id,
        model=accepted.model,
        queued_at=accepted.queued_at,
        metadata=submission.metadata,
        form=submission.response,
        request=submission,
    )
    try:
        if data.stream:
            return await _stream(exchange, queued, submission, data.as_sent)
        if data.background:
            return Response(await _now(gateway, accepted, queued))
        result = (await exchange.results())[0]
    except GatewayStopping:
        return stopping(accepted)
    if isinstance(result, Completed | Cancelled):
        return Response(queued.ended(result))
    return failure(JobError.of(result), data.as_sent)


@get("/v1/responses/{response_id:str}", responses=READ_ERRORS, operation_class=StreamOperation)
async def retrieve(
    request: Request[Any, Any, Any],
    response_id: FromPath[str],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    stream: FromQuery[bool] = False,
    starting_after: Annotated[int | None, QueryParameter(ge=0)] = None,
) -> Response[ResponseBody]:
    """The current state of a response. With `stream`, its events from the first one, or from the
    one after `starting_after`, at any gateway. Disconnecting does not cancel it."""
    gateway.require_ready()
    _check_query(request, "stream", "starting_after", "include_obfuscation")
    if starting_after is not None and not stream:
        raise InvalidRequest("starting_after: needs `stream=true`", "starting_after")
    job_id = _job_id(response_id)
    stored = await gateway.responses.find(job_id)
    queued = _queued(job_id, stored)
    if not stream:
        if isinstance(stored.job, PendingJob):
            return Response(queued.as_now(stored.job.status()))
        return Response(queued.ended(stored.job))
    after = FIRST_TIME if starting_after is None else starting_after
    return await _resumed_stream(request, gateway, streams, stored, queued, after)


@post("/v1/responses/{response_id:str}/cancel", status_code=200, responses=READ_ERRORS)
async def cancel(response_id: FromPath[str], gateway: NamedDependency[Gateway]) -> ResponseBody:
    """Cancel a response that is queued or in progress. It is safe to repeat this. 400 if the
    response has already ended in another way."""
    gateway.require_ready()
    job_id = _job_id(response_id)
    stored = await gateway.responses.find(job_id)
    try:
        status = await gateway.jobs.cancel(job_id)
    except AlreadyFinished:
        raise InvalidRequest(
            "response_id: this response has already ended and cannot be cancelled", "response_id"
        ) from None
    return _queued(job_id, stored).ended_as(status, [])


@delete("/v1/responses/{response_id:str}", status_code=200, responses=READ_ERRORS)
async def delete_response(
    response_id: FromPath[str], gateway: NamedDependency[Gateway]
) -> DeletedResponse:
    """Delete a response that has ended, with its events and its request."""
    gateway.require_ready()
    await gateway.responses.delete(_job_id(response_id))
    return DeletedResponse(response_id)


@get("/v1/responses/{response_id:str}/input_items", responses=READ_ERRORS)
async def input_items(
    request: Request[Any, Any, Any],
    response_id: FromPath[str],
    gateway: NamedDependency[Gateway],
    limit: Annotated[int, QueryParameter(ge=1, le=100)] = 20,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
    after: FromQuery[str | None] = None,
) -> ItemPage:
    """The items of a response's input, by default the last one first. `after` is the id of the last
    item of the previous page."""
    gateway.require_ready()
    _check_query(request, "limit", "order", "after")
    job_id = _job_id(response_id)
    stored = await gateway.responses.find(job_id)
    asked = gateway.responses.require_request(stored, "response_id")
    items = items_of((asked.messages or [])[stored.form.history :], job_id)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest(f"after: this input has no item {after[:80]!r}", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return ItemPage(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > limit,
    )


async def _now(gateway: Gateway, accepted: AcceptedJob, queued: ResponseBody) -> ResponseBody:
    if not accepted.is_replay:
        return queued
    job = await gateway.jobs.find(accepted.id)
    return queued.as_now(job.status()) if isinstance(job, PendingJob) else queued.ended(job)


async def _stream(
    exchange: Exchange, queued: ResponseBody, submission: ResponseSubmission, as_sent: AsSent
) -> Response[Any]:
    gateway, (accepted,) = exchange.gateway, exchange.jobs

    def format() -> AnswerFormat:
        return gateway.jobs.answer_format(accepted.model, submission)

    events = ResponseEvents(queued, accepted.id, format, FIRST_TIME)
    # Of one that was created before, it must be known which attempt's text is the right one.
    created = None if accepted.is_replay else accepted
    feed = exchange.open(
        gateway.events(accepted.id, accepted=created), lambda _: events.is_finished
    )
    if not submission.response.background:
        first = await exchange.first(feed, decides)
        status = first.data if first is not None else None
        if isinstance(status, JobStatus) and status.state == "FAILURE" and status.error is not None:
            events.is_finished = True
            return failure(status.error, as_sent)
    return event_stream(_messages(events, feed, exchange.silence_s))


async def _resumed_stream(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: OpenStreams,
    stored: StoredResponse,
    queued: ResponseBody,
    after: int,
) -> Response[Any]:
    job_id, job, asked = stored.job.id, stored.job, stored.request

    def format() -> AnswerFormat:
        if isinstance(job, Completed):
            return job.format or PLAIN
        return gateway.jobs.answer_format(job.model, asked) if asked else PLAIN

    events = ResponseEvents(queued, job_id, format, after)
    await require_connected(request)
    if isinstance(job, Completed):
        last = last_number(queued, job_id, job)
        if after > last:
            raise InvalidRequest(beyond_the_end(after, last), "starting_after")
        if job.attempt <= 1 or after < FIRST_OUTPUT:
            # The client has no other text than that of the result.
            async def whole() -> AsyncIterator[ServerSentEventMessage]:
                for event in (*events.opening(), *events.of_result(job)):
                    yield _message(event)

            return event_stream(whole())
    # What a job wrote that did not complete is in its events alone.
    streams.admit(request)
    feed = streams.read(gateway.events(job_id), request)
    try:
        await feed.peek(lambda _: True)  # an error gets its own status here
    except GatewayStopping:
        raise BrokerUnavailable("this gateway is shutting down; try another one") from None
    silence_s = ClientAttempt.of(request).within(KEEP_ALIVE_S)
    return event_stream(_messages(events, feed, silence_s))


async def _messages(
    events: ResponseEvents, feed: BufferedStream[JobEvent], silence_s: float
) -> AsyncIterator[ServerSentEventMessage]:
    for event in events.opening():
        yield _message(event)
    try:
        async for read in feed.items(silence_s):
            if read is None:
                yield COMMENT
                continue
            for event in events.of(read):
                yield _message(event)
            if events.is_finished:
                return
    except GatewayStopping:
        message = "this gateway is shutting down; resume at another one with starting_after"
        yield _message(events.error("gateway_stopping", message))


def _message(event: NumberedEvent) -> ServerSentEventMessage:
    return ServerSentEventMessage(event=event.type, data=encode(event.body).decode("utf-8"))


def _job_id(text: str) -> str:
    """Raises: UnknownResponse: it is not the id of a response."""
    job_id = job_of_response(text)
    if job_id is None:
        raise UnknownResponse(
            f"response_id: {text[:80]!r} is not the id of a response, which begins with `resp_`",
            "response_id",
        )
    return job_id


def _queued(job_id: str, stored: StoredResponse) -> ResponseBody:
    job = stored.job
    metadata = job.status().metadata if isinstance(job, PendingJob) else job.metadata
    return ResponseBody.queued(
        job_id=job_id,
        model=job.model,
        queued_at=job.queued_at,
        metadata=metadata,
        form=stored.form,
        request=stored.request,
    )


def _check_query(request: Request[Any, Any, Any], *known: str) -> None:
    """Check the parameters of the URL. `include` has no effect: what was included when the response
    was created is always returned.

    Raises:
        InvalidRequest: a parameter is not ``known`` or given twice, or a value of `include` is not
            supported.
    """
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        param = name.removesuffix("[]")
        if param not in (*known, "include", *WITHOUT_EFFECT):
            raise InvalidRequest(
                f"{name[:80]}: unknown parameter; use {', '.join(known)} or include",
                name[:80],
            )
        if param in seen and param != "include":
            raise InvalidRequest(f"{param} is given twice", param)
        seen.add(param)
        if param == "include" and value not in get_args(Includable):
            names = " and ".join(get_args(Includable))
            raise InvalidRequest(
                f"include: {value[:80]!r} is not available; there are {names}", "include"
            )
