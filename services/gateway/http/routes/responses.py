"""`/v1/responses`: OpenAI's Responses API. A response is a job, and is read from the broker."""

from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import ServerSentEventMessage
from msgspec import Struct

from services.gateway.gateway import Gateway
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import (
    ClientDisconnected,
    IdempotencyKey,
    require_connected,
    while_connected,
)
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import openai_error_responses
from services.gateway.http.openai.accept import accept
from services.gateway.http.openai.failures import (
    HEADERS_WITHIN_S,
    failure,
    stopping,
)
from services.gateway.http.openai.responses.body import ResponseBody
from services.gateway.http.openai.responses.conversation import conversation_of
from services.gateway.http.openai.responses.ids import job_of_response
from services.gateway.http.openai.responses.items import items_of
from services.gateway.http.openai.responses.requests import (
    INCLUDABLE,
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
from services.gateway.http.openai.responses.wording import in_words_of
from services.gateway.http.preferences import Preferences
from services.gateway.http.request_end import on_request_end
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
from shared.wire.api import JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Cancelled, Completed

ERRORS = openai_error_responses(404, 409, 410, 413, 422, 429, 504)
READ_ERRORS = openai_error_responses(404)
FIRST_TIME = -1
"""The number of the last event that a new client has."""


class DeletedResponse(Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemPage(Struct, frozen=True, kw_only=True):
    """The items of the input, not those of earlier responses."""

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
    """Create a response, as one body or as a stream. With `background` it is returned at once.
    Otherwise, if the client disconnects before its timeout, its job is cancelled, unless it sent an
    `Idempotency-Key`."""
    gateway.require_ready()
    attempt = ClientAttempt.of(request)
    data.check()
    preferences = Preferences.parse(request.headers.getall("prefer", []))
    survives_disconnect = (
        bool(data.background) or preferences.respond_async or idempotency_key is not None
    )
    if data.stream:
        streams.require_capacity()
    if not survives_disconnect:
        await require_connected(request)
    submission = data.submission(*await conversation_of(data, gateway.responses))
    # A stream keeps its client from reaching its timeout, and cancels its job itself.
    may_return = not (survives_disconnect or data.stream)
    with in_words_of(data):
        accepted = await accept(
            request, gateway, submission, attempt, idempotency_key, may_return=may_return
        )
    created = _Created(gateway, submission, accepted, attempt, survives_disconnect)
    try:
        if survives_disconnect:
            await require_connected(request)
        if data.stream:
            return await _stream(request, streams, created)
        if data.background:
            return Response(await _now(created))
        waiting = gateway.jobs.wait(accepted.id, accepted)
        result = await while_connected(request, gateway.stopping, waiting)
    except ClientDisconnected:
        if may_return and attempt.has_timed_out:
            gateway.orphans.add(accepted, submission)
        elif may_return:
            gateway.abandon(accepted.id)
        raise
    except GatewayStopping:
        return stopping(accepted)
    if isinstance(result, Completed | Cancelled):
        return Response(created.queued.ended(result))
    return failure(result)


@get("/v1/responses/{response_id:str}", responses=READ_ERRORS, operation_class=StreamOperation)
async def retrieve(
    request: Request[Any, Any, Any],
    response_id: FromPath[str],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    stream: FromQuery[bool] = False,
    starting_after: Annotated[int | None, QueryParameter(ge=0)] = None,
) -> Response[ResponseBody]:
    """A response as it is now; with `stream`, its events from the first on, or from the one after
    `starting_after`, whichever gateway they began at. Disconnecting cancels nothing."""
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
    """Cancel a response that is queued or in progress; harmless to repeat. 400 if it has ended in
    another way."""
    gateway.require_ready()
    job_id = _job_id(response_id)
    stored = await gateway.responses.find(job_id)
    try:
        status = await gateway.jobs.cancel(job_id)
    except AlreadyFinished:
        raise InvalidRequest(
            "response_id: this response has already ended, and cannot be cancelled", "response_id"
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
    """The items of a response's input, the last ones first; `after` is the id of the last one of
    the page before."""
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


@dataclass(frozen=True)
class _Created:
    """A response that was just created."""

    gateway: Gateway
    submission: ResponseSubmission
    accepted: AcceptedJob
    attempt: ClientAttempt
    survives_disconnect: bool

    @property
    def queued(self) -> ResponseBody:
        return ResponseBody.queued(
            job_id=self.accepted.id,
            model=self.accepted.model,
            queued_at=self.accepted.queued_at,
            metadata=self.submission.metadata,
            form=self.submission.response,
            request=self.submission,
        )

    def format(self) -> AnswerFormat:
        return self.gateway.jobs.answer_format(self.accepted.model, self.submission)


async def _now(created: _Created) -> ResponseBody:
    accepted = created.accepted
    if not accepted.is_replay:
        return created.queued
    job = await created.gateway.jobs.find(accepted.id)
    if isinstance(job, PendingJob):
        return created.queued.as_now(job.status())
    return created.queued.ended(job)


async def _stream(
    request: Request[Any, Any, Any], streams: OpenStreams, created: _Created
) -> Response[Any]:
    gateway, accepted, attempt = created.gateway, created.accepted, created.attempt
    events = ResponseEvents(created.queued, accepted.id, created.format, FIRST_TIME)

    def abandon() -> None:
        if not (events.is_finished or created.survives_disconnect):
            gateway.abandon(accepted.id)

    on_request_end(request, abandon)
    feed = streams.open(gateway.events(accepted.id, accepted=accepted), request)
    early: list[JobEvent] = []
    if not created.submission.response.background:
        with suppress(TimeoutError):
            await while_connected(
                request,
                gateway.stopping,
                _read_to_output(feed, early),
                attempt.within(HEADERS_WITHIN_S),
            )
    last = early[-1].data if early else None
    if isinstance(last, JobStatus) and last.state == "FAILURE" and last.error is not None:
        for _ in events.of(early[-1]):
            pass
        return failure(last.error)
    silence_s = attempt.within(KEEP_ALIVE_S)
    return event_stream(_messages(events, feed, early, silence_s))


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
        if not isinstance(job, PendingJob):
            return (isinstance(job, Completed) and job.format) or PLAIN
        return gateway.jobs.answer_format(job.model, asked) if asked else PLAIN

    events = ResponseEvents(queued, job_id, format, after)
    await require_connected(request)
    if not isinstance(job, PendingJob):
        last = last_number(queued, job_id, job)
        if after > last:
            raise InvalidRequest(beyond_the_end(after, last), "starting_after")
        if not isinstance(job, Completed) or job.attempt <= 1 or after < FIRST_OUTPUT:
            # The client has no other text than that of the result.
            async def whole() -> AsyncIterator[ServerSentEventMessage]:
                for event in (*events.opening(), *events.of_result(job)):
                    yield _message(event)

            return event_stream(whole())
    feed = streams.open(gateway.events(job_id), request)
    try:
        first = await feed.next()  # an error gets its own status here
    except GatewayStopping:
        raise BrokerUnavailable("this gateway is shutting down; try another one") from None
    silence_s = ClientAttempt.of(request).within(KEEP_ALIVE_S)
    return event_stream(_messages(events, feed, [first], silence_s))


async def _read_to_output(feed: BufferedStream[JobEvent], early: list[JobEvent]) -> None:
    """Read into ``early`` up to the first event that decides whether the stream begins well."""
    while not early or early[-1].event not in ("tokens", "result", "error"):
        early.append(await feed.next())


async def _messages(
    events: ResponseEvents,
    feed: BufferedStream[JobEvent],
    early: Iterable[JobEvent],
    silence_s: float,
) -> AsyncIterator[ServerSentEventMessage]:
    """The stream of ``events``: those of what was read ``early``, and of what follows."""
    for event in events.opening():
        yield _message(event)
    for read in early:
        for event in events.of(read):
            yield _message(event)
    try:
        while not events.is_finished:
            try:
                read = await feed.next(silence_s)
            except TimeoutError:
                yield COMMENT
                continue
            for event in events.of(read):
                yield _message(event)
    except GatewayStopping:
        message = "this gateway is shutting down; go on at another one, with starting_after"
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
    """Check the parameters of the URL. What can be included is there if it was asked for when the
    response was created.

    Raises:
        InvalidRequest: one is not ``known`` or given twice, or something else is to be included.
    """
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        param = name.removesuffix("[]")
        if param not in (*known, "include"):
            raise InvalidRequest(
                f"{name[:80]} is not a parameter here; there are include, {', '.join(known)}",
                name[:80],
            )
        if param in seen and param != "include":
            raise InvalidRequest(f"{param} is given twice", param)
        seen.add(param)
        if param == "include" and value not in INCLUDABLE:
            raise InvalidRequest(
                f"include: {value[:80]!r} is not available; there are {' and '.join(INCLUDABLE)}",
                "include",
            )
