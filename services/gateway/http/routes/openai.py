"""The part of OpenAI's HTTP API that a text model can serve; its official client works on it."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from litestar import Request, Response, get, post
from litestar.response import ServerSentEvent, ServerSentEventMessage

from services.gateway.gateway import Gateway
from services.gateway.http.connection import (
    ClientGone,
    IdempotencyKey,
    require_client,
    while_connected,
)
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import OpenAIError, openai_error, openai_refusals
from services.gateway.http.openai.messages import (
    Answer,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    chunk,
    completion,
    usage_chunk,
)
from services.gateway.http.preferences import Preferences
from services.gateway.http.request_end import at_request_end
from services.gateway.http.sse import KEEP_ALIVE_S, Feed, GatewayStopping, Streams
from services.gateway.jobs.accepted import Ticket
from services.gateway.jobs.events import JobEvent, Tokens
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Cancelled, Completed, Expired, Failed

HEADERS_WITHIN_S = 5.0
"""How long a stream's status line waits for the first token: a job that fails at once then has
its own status. After that the stream opens, so that nobody on the way gives up on it."""

ENDS = {
    **dict.fromkeys(("invalid_request", "prompt_too_long", "result_too_large"), 400),
    **dict.fromkeys(("job_not_found", "job_aged_out"), 404),
    **dict.fromkeys(("cancelled", "client_disconnected"), 409),
    **dict.fromkeys(("deadline_passed", "timed_out"), 504),
}
"""The status of a job that ended for this reason; 500 for any other."""

# The official client would send the request again on 409 and 5xx, and so run the job twice.
NO_RETRY = {"x-should-retry": "false"}

ANSWERS = openai_refusals(404, 409, 410, 413, 422, 429, 504)


@post("/v1/chat/completions", status_code=200, responses=ANSWERS, operation_class=StreamOperation)
async def chat_completions(
    request: Request[Any, Any, Any],
    data: ChatRequest,
    gateway: Gateway,
    streams: Streams,
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Answer a conversation, at once or as a stream. A client that hangs up cancels its job,
    unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/completions", status_code=200, responses=ANSWERS, operation_class=StreamOperation)
async def completions(
    request: Request[Any, Any, Any],
    data: CompletionRequest,
    gateway: Gateway,
    streams: Streams,
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Continue a prompt, at once or as a stream. A client that hangs up cancels its job,
    unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@get("/v1/models", responses=openai_refusals())
async def list_models(gateway: Gateway) -> ModelList:
    """Every model that has a queue, whether or not an inferer is alive."""
    gateway.require_ready()
    await gateway.fleet.refresh()
    return ModelList(data=[ModelCard.of(model) for model in gateway.fleet.models.values()])


@get("/v1/models/{model:path}", responses=openai_refusals(404))
async def get_model(model: str, gateway: Gateway) -> ModelCard:
    """One model by its name, which may contain slashes, as they are or as `%2F`."""
    gateway.require_ready()
    return ModelCard.of(await gateway.fleet.model(model.removeprefix("/")))


async def _answer(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: Streams,
    asked: ChatRequest | CompletionRequest,
    idempotency_key: str | None,
) -> Response[Any]:
    gateway.require_ready()
    preferences = Preferences.parse(request.headers.getall("prefer", []))
    stays = preferences.respond_async or idempotency_key is not None
    if asked.wants_stream:
        streams.require_room()
    if not stays:
        await require_client(request)
    ticket = await gateway.idempotency.submit(asked.submission(), idempotency_key)
    try:
        if stays:
            await require_client(request)
        if asked.wants_stream:
            return await _stream(request, gateway, streams, ticket, asked.wants_usage, stays)
        waiting = gateway.jobs.wait(ticket.id, ticket)
        result = await while_connected(request, gateway.stopping, waiting)
    except ClientGone:
        if not (stays or asked.wants_stream):  # a stream does it when it ends
            gateway.abandon(ticket.id)
        raise
    except GatewayStopping:
        return Response(_stopping_error(ticket), status_code=503, headers=NO_RETRY)
    if isinstance(result, Completed):
        return Response(completion(ticket, result))
    return _failure(result)


async def _stream(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: Streams,
    ticket: Ticket,
    include_usage: bool,
    stays: bool,
) -> Response[Any]:
    is_over = False

    def abandon() -> None:
        if not (is_over or stays):
            gateway.abandon(ticket.id)

    at_request_end(request, abandon)
    feed = streams.open(gateway.events(ticket.id, ticket=ticket), request)
    first: JobEvent | None = None
    with suppress(TimeoutError):
        first = await while_connected(
            request, gateway.stopping, _first_output(feed), HEADERS_WITHIN_S
        )
    error = first.data if first is not None else None
    if isinstance(error, JobStatus):
        error = error.error
    if isinstance(error, JobError):
        is_over = True
        return _failure(error)

    async def chunks() -> AsyncIterator[ServerSentEventMessage]:
        nonlocal is_over
        try:
            yield _data(chunk(ticket, "", include_usage, opening=True))
            for_now = first
            while True:
                try:
                    event = for_now or await feed.next(KEEP_ALIVE_S)
                except TimeoutError:
                    yield ServerSentEventMessage(comment="")
                    continue
                for_now = None
                is_over = event.event in ("result", "error")
                for part in _parts(ticket, event, include_usage):
                    yield part
                if is_over or event.event == "retrying":  # this API has no word for the latter
                    return
        except GatewayStopping:
            yield _data(_stopping_error(ticket))

    return ServerSentEvent(chunks())


async def _first_output(feed: Feed[JobEvent]) -> JobEvent:
    """The first event that a client of this API can see."""
    while True:
        event = await feed.next()
        if event.event in ("tokens", "result", "error"):
            return event


def _parts(ticket: Ticket, event: JobEvent, include_usage: bool) -> list[ServerSentEventMessage]:
    """What one event of the job is in the words of this API."""
    if event.event == "retrying":
        message = "a second attempt came out differently from what was sent; send the request again"
        return [_data(openai_error(500, "attempt_differs", message))]
    if isinstance(event.data, Tokens):
        return [_data(chunk(ticket, event.data.text, include_usage))]
    if isinstance(event.data, JobError):
        return [_data(_error(event.data))]
    if not isinstance(event.data, JobStatus) or event.event != "result":
        return []
    status = event.data
    if status.result is None:
        assert status.error is not None
        return [_data(_error(status.error))]
    parts = [_data(chunk(ticket, "", include_usage, finish_reason=status.result.finish_reason))]
    if include_usage:
        parts.append(_data(usage_chunk(ticket, status.result.usage)))
    return [*parts, ServerSentEventMessage(data="[DONE]")]


def _failure(why: JobError | Failed | Cancelled | Expired) -> Response[Any]:
    """The answer for a job that did not complete."""
    return Response(_error(why), status_code=ENDS.get(why.code, 500), headers=NO_RETRY)


def _error(why: JobError | Failed | Cancelled | Expired) -> OpenAIError:
    return openai_error(ENDS.get(why.code, 500), why.code, why.message)


def _stopping_error(ticket: Ticket) -> OpenAIError:
    return openai_error(
        503,
        "gateway_stopping",
        f"this gateway is shutting down; the job goes on, see /status/{ticket.id}",
    )


def _data(body: Any) -> ServerSentEventMessage:
    return ServerSentEventMessage(data=encode(body).decode("utf-8"))
