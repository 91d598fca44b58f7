"""`/v1`: the part of OpenAI's HTTP API that a text model can serve, for its official client."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from litestar import Request, Response, get, post
from litestar.response import ServerSentEventMessage

from services.gateway.gateway import Gateway
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import (
    ClientDisconnected,
    IdempotencyKey,
    require_connected,
    while_connected,
)
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import openai_error, openai_error_responses
from services.gateway.http.openai.accept import accept
from services.gateway.http.openai.answers import Answer, Chunks, completion
from services.gateway.http.openai.failures import (
    HEADERS_WITHIN_S,
    error_of,
    failure,
    stopping,
    stopping_error,
)
from services.gateway.http.openai.inputs import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    RerankRequest,
    RerankResponse,
)
from services.gateway.http.openai.models import ModelCard, ModelList
from services.gateway.http.openai.requests import ChatRequest, CompletionRequest
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
from services.gateway.jobs.events import JobEvent, Tokens
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Completed

RESPONSES = openai_error_responses(404, 409, 410, 413, 422, 429, 504)


@post("/v1/chat/completions", status_code=200, responses=RESPONSES, operation_class=StreamOperation)
async def chat_completions(
    request: Request[Any, Any, Any],
    data: ChatRequest,
    gateway: Gateway,
    streams: OpenStreams,
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Answer a conversation, as one response or as a stream. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/completions", status_code=200, responses=RESPONSES, operation_class=StreamOperation)
async def completions(
    request: Request[Any, Any, Any],
    data: CompletionRequest,
    gateway: Gateway,
    streams: OpenStreams,
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Continue a prompt, as one response or as a stream. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/embeddings", status_code=200, responses=RESPONSES)
async def embeddings(
    request: Request[Any, Any, Any],
    data: EmbeddingsRequest,
    gateway: Gateway,
    streams: OpenStreams,
    idempotency_key: IdempotencyKey = None,
) -> Response[EmbeddingsResponse]:
    """Compute an embedding of each input. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/rerank", status_code=200, responses=RESPONSES)
async def rerank(
    request: Request[Any, Any, Any],
    data: RerankRequest,
    gateway: Gateway,
    streams: OpenStreams,
    idempotency_key: IdempotencyKey = None,
) -> Response[RerankResponse]:
    """Rank documents by their relevance for a query. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@get("/v1/models", responses=openai_error_responses())
async def list_models(gateway: Gateway) -> ModelList:
    """Every model that has a queue, with or without a live inferer."""
    gateway.require_ready()
    await gateway.fleet.refresh()
    return ModelList(data=[ModelCard.of(model) for model in gateway.fleet.models.values()])


@get("/v1/models/{model:path}", responses=openai_error_responses(404))
async def get_model(model: str, gateway: Gateway) -> ModelCard:
    """One model by its name, which may contain slashes, plain or as `%2F`."""
    gateway.require_ready()
    return ModelCard.of(await gateway.fleet.model(model.removeprefix("/")))


async def _answer(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: OpenStreams,
    body: ChatRequest | CompletionRequest | EmbeddingsRequest | RerankRequest,
    idempotency_key: str | None,
) -> Response[Any]:
    gateway.require_ready()
    attempt = ClientAttempt.of(request)
    preferences = Preferences.parse(request.headers.getall("prefer", []))
    survives_disconnect = preferences.respond_async or idempotency_key is not None
    # A stream keeps its client from reaching its timeout, and cancels its job itself.
    may_return = not (survives_disconnect or body.wants_stream)
    if body.wants_stream:
        streams.require_capacity()
    if not survives_disconnect:
        await require_connected(request)
    submission = body.submission()
    accepted = await accept(
        request, gateway, submission, attempt, idempotency_key, may_return=may_return
    )
    try:
        if survives_disconnect:
            await require_connected(request)
        if isinstance(body, ChatRequest | CompletionRequest) and body.wants_stream:
            return await _stream(
                request, gateway, streams, accepted, body, attempt, survives_disconnect
            )
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
    if isinstance(result, Completed):
        if isinstance(body, EmbeddingsRequest | RerankRequest):
            return Response(body.response(accepted, result))
        return Response(completion(accepted, result, body.echoed))
    return failure(result)


async def _stream(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: OpenStreams,
    accepted: AcceptedJob,
    body: ChatRequest | CompletionRequest,
    attempt: ClientAttempt,
    survives_disconnect: bool,
) -> Response[Any]:
    is_finished = False

    def abandon() -> None:
        if not (is_finished or survives_disconnect):
            gateway.abandon(accepted.id)

    on_request_end(request, abandon)
    feed = streams.open(gateway.events(accepted.id, accepted=accepted), request)
    first: JobEvent | None = None
    with suppress(TimeoutError):
        first = await while_connected(
            request, gateway.stopping, _first_output(feed), attempt.within(HEADERS_WITHIN_S)
        )
    error = first.data if first is not None else None
    if isinstance(error, JobStatus):
        error = error.error
    if isinstance(error, JobError):
        is_finished = True
        return failure(error)

    async def messages() -> AsyncIterator[ServerSentEventMessage]:
        nonlocal is_finished
        chunks = Chunks(accepted, body.n or 1, body.wants_usage, body.echoed)
        try:
            for chunk in chunks.opening():
                yield _data(chunk)
            pending = first
            while True:
                try:
                    event = pending or await feed.next(attempt.within(KEEP_ALIVE_S))
                except TimeoutError:
                    yield COMMENT
                    continue
                pending = None
                is_finished = event.event in ("result", "error")
                for part in _parts(chunks, event):
                    yield part
                if is_finished or event.event == "retrying":  # which this API cannot express
                    return
        except GatewayStopping:
            yield _data(stopping_error(accepted))

    return event_stream(messages())


async def _first_output(feed: BufferedStream[JobEvent]) -> JobEvent:
    """The first event that is visible in this API."""
    while True:
        event = await feed.next()
        if event.event in ("tokens", "result", "error"):
            return event


def _parts(chunks: Chunks, event: JobEvent) -> list[ServerSentEventMessage]:
    """What this API sends for one event of the job."""
    if event.event == "retrying":
        message = "a second attempt produced a different text than was sent; send the request again"
        return [_data(openai_error(500, "attempt_differs", message))]
    if isinstance(event.data, Tokens):
        return list(map(_data, chunks.text(event.data)))
    if isinstance(event.data, JobError):
        return [_data(error_of(event.data))]
    if not isinstance(event.data, JobStatus) or event.event != "result":
        return []
    status = event.data
    if status.result is None:
        assert status.error is not None
        return [_data(error_of(status.error))]
    parts = list(map(_data, chunks.end(status.result)))
    return [*parts, ServerSentEventMessage(data="[DONE]")]


def _data(body: Any) -> ServerSentEventMessage:
    return ServerSentEventMessage(data=encode(body).decode("utf-8"))
