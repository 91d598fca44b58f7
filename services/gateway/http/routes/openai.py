"""`/v1`: the part of OpenAI's HTTP API that a text model can serve, for its official client."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from litestar.response import ServerSentEventMessage

from services.gateway.gateway import Gateway
from services.gateway.http.caller import caller_of
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import (
    ClientDisconnected,
    IdempotencyKey,
    require_connected,
    while_connected,
)
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import openai_error, openai_error_responses
from services.gateway.http.openai.answers import Answer, Chunks, completion, usage_chunk
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
from services.gateway.jobs.several import Adopted, RefusedTogether, named
from shared.background import merged
from shared.errors import InvalidRequest
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import encode
from shared.wire.results import Completed, Usage

NO_USAGE = Usage(0, 0, 0)
"""The usage of a job that failed."""

NumberedEvent = tuple[int, JobEvent]
"""An event with the index of its job in the request."""

RESPONSES = openai_error_responses(404, 409, 410, 413, 422, 429, 504)


@post("/v1/chat/completions", status_code=200, responses=RESPONSES, operation_class=StreamOperation)
async def chat_completions(
    request: Request[Any, Any, Any],
    data: JSONBody[ChatRequest],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Answer a conversation, as one response or as a stream. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/completions", status_code=200, responses=RESPONSES, operation_class=StreamOperation)
async def completions(
    request: Request[Any, Any, Any],
    data: JSONBody[CompletionRequest],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    idempotency_key: IdempotencyKey = None,
) -> Response[Answer]:
    """Continue a prompt, as one response or as a stream. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/embeddings", status_code=200, responses=RESPONSES)
async def embeddings(
    request: Request[Any, Any, Any],
    data: JSONBody[EmbeddingsRequest],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    idempotency_key: IdempotencyKey = None,
) -> Response[EmbeddingsResponse]:
    """Compute an embedding of each input. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@post("/v1/rerank", status_code=200, responses=RESPONSES)
async def rerank(
    request: Request[Any, Any, Any],
    data: JSONBody[RerankRequest],
    gateway: NamedDependency[Gateway],
    streams: NamedDependency[OpenStreams],
    idempotency_key: IdempotencyKey = None,
) -> Response[RerankResponse]:
    """Rank documents by their relevance to a query. If the client disconnects before its
    timeout, its job is cancelled, unless it sent an `Idempotency-Key`."""
    return await _answer(request, gateway, streams, data, idempotency_key)


@get("/v1/models", responses=openai_error_responses())
async def list_models(gateway: NamedDependency[Gateway]) -> ModelList:
    """Every model that has a queue, with or without a live inferer."""
    gateway.require_ready()
    await gateway.fleet.refresh()
    return ModelList(data=[ModelCard.of(model) for model in gateway.fleet.models.values()])


@get("/v1/models/{model:path}", responses=openai_error_responses(404))
async def get_model(model: FromPath[str], gateway: NamedDependency[Gateway]) -> ModelCard:
    """A model by its name, which may contain slashes, also as `%2F`."""
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
    # The client of a stream does not time out, and a closed stream cancels its job itself.
    may_return = not (survives_disconnect or body.wants_stream)
    if body.wants_stream:
        streams.require_capacity()
    if not survives_disconnect:
        await require_connected(request)
    caller = caller_of(request, "openai")
    try:
        submissions = body.submissions()
        jobs: Adopted = [None] * len(submissions)
        if may_return and attempt.is_retry:
            jobs = await gateway.several.adopt(submissions, caller)
            if None in jobs:
                await require_connected(request)  # it may be gone after the wait for an orphan
        accepted = await gateway.several.submit(submissions, caller, idempotency_key, jobs)
        jobs = [*accepted]
        if survives_disconnect:
            await require_connected(request)
        if isinstance(body, ChatRequest | CompletionRequest) and body.wants_stream:
            return await _stream(
                request, gateway, streams, accepted, body, attempt, survives_disconnect
            )
        waiting = asyncio.gather(*(gateway.jobs.wait(job.id, job) for job in accepted))
        results = await while_connected(request, gateway.stopping, waiting)
    except RefusedTogether as refused:
        raise named(refused, "prompt", body.as_sent) from None
    except InvalidRequest as error:
        raise body.as_sent(error) from None
    except ClientDisconnected:
        if may_return and attempt.has_timed_out:
            gateway.several.orphan(submissions, jobs)
        elif may_return and not gateway.stopping.is_set():
            gateway.several.abandon(jobs)
        raise
    except GatewayStopping:
        return stopping(accepted[0])
    completed = []
    for number, result in enumerate(results):
        if not isinstance(result, Completed):
            return failure(result, _item(number, accepted))
        completed.append(result)
    if isinstance(body, EmbeddingsRequest | RerankRequest):
        return Response(body.response(accepted[0], completed[0]))
    return Response(completion(accepted, completed, body.echoed))


async def _stream(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    streams: OpenStreams,
    accepted: list[AcceptedJob],
    body: ChatRequest | CompletionRequest,
    attempt: ClientAttempt,
    survives_disconnect: bool,
) -> Response[Any]:
    usages: dict[int, Usage] = {}
    """The usages of jobs that have ended, by their index."""

    def abandon() -> None:
        for number, job in enumerate(accepted):
            if not (number in usages or survives_disconnect):
                gateway.abandon(job.id)

    on_request_end(request, abandon)
    events = merged([gateway.events(job.id, accepted=job) for job in accepted])
    feed = streams.open(events, request)
    first: NumberedEvent | None = None
    with suppress(TimeoutError):
        first = await while_connected(
            request, gateway.stopping, _first_output(feed), attempt.within(HEADERS_WITHIN_S)
        )
    error = first[1].data if first is not None else None
    if isinstance(error, JobStatus):
        error = error.error
    if first is not None and isinstance(error, JobError):
        usages[first[0]] = NO_USAGE
        return failure(error, _item(first[0], accepted))

    async def messages() -> AsyncIterator[ServerSentEventMessage]:
        n = body.n or 1
        writers = [
            Chunks(job, n, body.wants_usage, echoed, accepted[0], number * n)
            for number, (job, echoed) in enumerate(zip(accepted, body.echoed, strict=True))
        ]
        try:
            for chunk in chain.from_iterable(writer.opening() for writer in writers):
                yield _data(chunk)
            pending = first
            while len(usages) < len(accepted):
                try:
                    number, event = pending or await feed.next(attempt.within(KEEP_ALIVE_S))
                except TimeoutError:
                    yield COMMENT
                    continue
                pending = None
                usage = _usage(event)
                if usage is not None:
                    usages[number] = usage
                for part in _parts(writers[number], event, _item(number, accepted)):
                    yield part
                if usage is NO_USAGE or event.event == "retrying":  # not expressible in this API
                    return
            if body.wants_usage:
                yield _data(usage_chunk(accepted[0], list(usages.values())))
            yield ServerSentEventMessage(data="[DONE]")
        except GatewayStopping:
            yield _data(stopping_error(accepted[0]))

    return event_stream(messages())


def _usage(event: JobEvent) -> Usage | None:
    """The usage of a job that ends with this event; `NO_USAGE` if it failed, None if it runs."""
    if event.event not in ("result", "error"):
        return None
    status = event.data
    if isinstance(status, JobStatus) and status.result is not None:
        return status.result.usage
    return NO_USAGE


async def _first_output(feed: BufferedStream[NumberedEvent]) -> NumberedEvent:
    """The first event that is visible in this API."""
    while True:
        number, event = await feed.next()
        if event.event in ("tokens", "result", "error"):
            return number, event


def _item(number: int, jobs: Sequence[AcceptedJob]) -> str:
    """The beginning of errors about one of several jobs."""
    return f"prompt[{number}]: " if len(jobs) > 1 else ""


def _parts(chunks: Chunks, event: JobEvent, item: str) -> list[ServerSentEventMessage]:
    """What this API sends for an event of a job, whose errors begin with ``item``."""
    if event.event == "retrying":
        message = "a second attempt wrote a different text; send the request again"
        return [_data(openai_error(500, "attempt_differs", message))]
    if isinstance(event.data, Tokens):
        return list(map(_data, chunks.text(event.data)))
    if isinstance(event.data, JobError):
        return [_data(error_of(event.data, item))]
    if not isinstance(event.data, JobStatus) or event.event != "result":
        return []
    status = event.data
    if status.result is None:
        assert status.error is not None
        return [_data(error_of(status.error, item))]
    return list(map(_data, chunks.end(status.result)))


def _data(body: Any) -> ServerSentEventMessage:
    return ServerSentEventMessage(data=encode(body).decode("utf-8"))
