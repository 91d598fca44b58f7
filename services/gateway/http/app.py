"""The HTTP application around a gateway."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.datastructures import Headers, MutableScopeHeaders
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi.config import OpenAPIConfig
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.gateway import Gateway
from services.gateway.http.connection import ClientGone, answer_nobody
from services.gateway.http.document import StructSchemas
from services.gateway.http.errors import answer_crash, answer_error, answer_http_error
from services.gateway.http.methods import allowed_methods
from services.gateway.http.origins import Sources
from services.gateway.http.request import StrictRequest
from services.gateway.http.request_end import with_request_end
from services.gateway.http.routes import dead_letters as dead
from services.gateway.http.routes import fleet, health, jobs, openai
from services.gateway.http.sse import Streams
from shared import __version__
from shared.errors import SluiceError
from shared.job_ids import new_job_id

REQUEST_ID = "x-request-id"


def create_app(gateway: Gateway, on_fatal: Callable[[], None]) -> ASGIApp:
    """The routes of one gateway; ``on_fatal`` is called when it can never serve."""

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with gateway.running(on_fatal):
            yield

    async def provide_gateway() -> Gateway:
        return gateway

    streams = Streams(gateway.settings.max_streams, gateway.stopping)

    async def provide_streams() -> Streams:
        return streams

    def in_time(app: ASGIApp) -> ASGIApp:
        """No route keeps a gateway that stops from stopping."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            begun = asyncio.Event()

            async def send_on(message: Message) -> None:
                begun.set()
                await send(message)

            await gateway.in_time(app(scope, receive, send_on), begun)

        return answer

    settings = gateway.settings
    app = Litestar(
        route_handlers=[
            jobs.submit,
            jobs.status,
            jobs.events,
            jobs.cancel,
            dead.letters,
            dead.letter,
            dead.retry,
            dead.drop,
            fleet.queue,
            fleet.inferers,
            fleet.set_concurrency,
            openai.chat_completions,
            openai.completions,
            openai.list_models,
            openai.get_model,
            health.healthz,
            health.readyz,
        ],
        dependencies={
            "gateway": Provide(provide_gateway),
            "streams": Provide(provide_streams),
        },
        lifespan=[lifespan],
        request_class=StrictRequest,
        request_max_body_size=settings.max_body_bytes,
        exception_handlers={
            SluiceError: answer_error,
            HTTPException: answer_http_error,
            ClientGone: answer_nobody,
            Exception: answer_crash,
        },
        middleware=[with_request_end, in_time],
        before_send=[_complete_headers],
        logging_config=None,  # structlog is set up for the whole process
        plugins=[StructSchemas()],
        openapi_config=OpenAPIConfig(title="Sluice", version=__version__),
        signature_types=[Gateway, Streams],
        cors_config=CORSConfig(
            allow_origins=settings.origins,
            expose_headers=["location", "retry-after", "preference-applied", REQUEST_ID],
        )
        if settings.origins
        else None,
    )
    return Sources(app, [settings.host, *settings.host_names], settings.origins)


async def _complete_headers(message: Message, scope: Scope) -> None:
    """Send the caller's own request id back, or one of ours; and all methods of a path."""
    if message["type"] == "http.response.start":
        headers = MutableScopeHeaders.from_message(message)
        given = Headers.from_scope(scope).get(REQUEST_ID, "")[:128]
        headers[REQUEST_ID] = given or new_job_id()
        if "allow" in headers:
            headers["allow"] = allowed_methods(scope)
