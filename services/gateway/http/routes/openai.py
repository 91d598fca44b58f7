"""`/v1`: the part of OpenAI's HTTP API that a text model can serve, for its official client."""

from collections.abc import AsyncIterator, Sequence
from itertools import chain
from typing import Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from litestar.response import ServerSentEventMessage

from services.gateway.gateway import Gateway
from services.gateway.http.connection import IdempotencyKey
from services.gateway.http.document import StreamOperation
from services.gateway.http.errors import openai_error, openai_error_responses
from services.gateway.http.openai.answers import Answer, Chunks, completion, usage_chunk
from services.gateway.http.openai.exchange import Exchange, decides
from services.gateway.http.openai.failures import (
    AsSent,
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
from services.gateway.http.sse import (
    COMMENT,
    GatewayStopping,
    OpenStreams,
    event_stream,
)
from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import JobEvent, Tokens
from services.gateway.jobs.several import RefusedTogether, named
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
    exchange = Exchange(request, gateway, streams, idempotency_key, is_stream=body.wants_stream)
    await exchange.require_client()
    try:
        await exchange.accept(body.submissions())
        if isinstance(body, ChatRequest | CompletionRequest) and body.wants_stream:
            return await _stream(exchange, body)
        results = await exchange.results()
    except RefusedTogether as refused:
        raise named(refused, "prompt", body.as_sent) from None
    except InvalidRequest as error:
        raise body.as_sent(error) from None
    except GatewayStopping:
        return stopping(exchange.jobs[0])
    completed = []
    for number, result in sorted(results.items()):
        if not isinstance(result, Completed):
            why = JobError.of(result)
            return failure(why, body.as_sent, _item(number, exchange.jobs))
        completed.append(result)
    if isinstance(body, EmbeddingsRequest | RerankRequest):
        return Response(body.response(exchange.jobs[0], completed[0]))
    return Response(completion(exchange.jobs, completed, body.echoed))


async def _stream(exchange: Exchange, body: ChatRequest | CompletionRequest) -> Response[Any]:
    jobs, gateway = exchange.jobs, exchange.gateway
    usages: dict[int, Usage] = {}
    """Of the jobs that have ended, by their number."""
    events = merged([gateway.events(job.id, accepted=job) for job in jobs])
    feed = exchange.open(events, usages.__contains__)
    first = await exchange.first(feed, lambda item: decides(item[1]))
    if first is not None and (error := _error(first[1])) is not None:
        usages[first[0]] = NO_USAGE
        exchange.fail(usages.__contains__)
        return failure(error, body.as_sent, _item(first[0], jobs))

    async def messages() -> AsyncIterator[ServerSentEventMessage]:
        n = body.n or 1
        writers = [
            Chunks(job, n, body.wants_usage, echoed, jobs[0], number * n)
            for number, (job, echoed) in enumerate(zip(jobs, body.echoed, strict=True))
        ]
        try:
            for chunk in chain.from_iterable(writer.opening() for writer in writers):
                yield _data(chunk)
            async for item in feed.items(exchange.silence_s):
                if item is None:
                    yield COMMENT
                    continue
                number, event = item
                usage = _usage(event)
                if usage is not None:
                    usages[number] = usage
                for part in _parts(writers[number], event, body.as_sent, _item(number, jobs)):
                    yield part
                if usage is NO_USAGE or event.event == "retrying":  # not expressible in this API
                    exchange.fail(usages.__contains__)
                    return
                if len(usages) == len(jobs):
                    break
            if body.wants_usage:
                yield _data(usage_chunk(jobs[0], list(usages.values())))
            yield ServerSentEventMessage(data="[DONE]")
        except GatewayStopping:
            yield _data(stopping_error(jobs[0]))

    return event_stream(messages())


def _error(event: JobEvent) -> JobError | None:
    """Why the job ended with this event; None if it goes on, or has completed."""
    if isinstance(event.data, JobStatus):
        return event.data.error
    return event.data if isinstance(event.data, JobError) else None


def _usage(event: JobEvent) -> Usage | None:
    """The usage of a job that ends with this event; `NO_USAGE` if it failed, None if it runs."""
    if event.event not in ("result", "error"):
        return None
    status = event.data
    if isinstance(status, JobStatus) and status.result is not None:
        return status.result.usage
    return NO_USAGE


def _item(number: int, jobs: Sequence[AcceptedJob]) -> str:
    """What errors about one of several jobs name."""
    return f"prompt[{number}]" if len(jobs) > 1 else ""


def _parts(
    chunks: Chunks, event: JobEvent, as_sent: AsSent, item: str
) -> list[ServerSentEventMessage]:
    """What this API sends for an event of a job, whose errors name the ``item``."""
    if event.event == "retrying":
        message = "a second attempt wrote a different text; send the request again"
        return [_data(openai_error(500, "attempt_differs", message))]
    if isinstance(event.data, Tokens):
        return list(map(_data, chunks.text(event.data)))
    if isinstance(event.data, JobError):
        return [_data(error_of(event.data, as_sent, item))]
    if not isinstance(event.data, JobStatus) or event.event != "result":
        return []
    status = event.data
    if status.result is None:
        assert status.error is not None
        return [_data(error_of(status.error, as_sent, item))]
    return list(map(_data, chunks.end(status.result)))


def _data(body: Any) -> ServerSentEventMessage:
    return ServerSentEventMessage(data=encode(body).decode("utf-8"))
