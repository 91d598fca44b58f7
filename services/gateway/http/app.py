"""The ASGI application of a gateway."""

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
from services.gateway.http.connection import ClientDisconnected, handle_client_disconnected
from services.gateway.http.document import StructSchemaPlugin
from services.gateway.http.errors import handle_crash, handle_http_exception, handle_sluice_error
from services.gateway.http.methods import allowed_methods
from services.gateway.http.origins import OriginCheck
from services.gateway.http.page import DocumentPage
from services.gateway.http.request import StrictRequest
from services.gateway.http.request_end import request_end_middleware
from services.gateway.http.routes import dead_letters as dead
from services.gateway.http.routes import fleet, health, jobs, openai, responses
from services.gateway.http.sse import OpenStreams
from shared import __version__
from shared.errors import SluiceError
from shared.job_ids import new_job_id

REQUEST_ID = "x-request-id"


def create_app(gateway: Gateway, on_fatal: Callable[[], None]) -> ASGIApp:
    """The application for one gateway; ``on_fatal`` is called if the gateway can never serve."""

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with gateway.running(on_fatal):
            yield

    async def provide_gateway() -> Gateway:
        return gateway

    streams = OpenStreams(gateway.settings.max_streams, gateway.stopping)

    async def provide_streams() -> OpenStreams:
        return streams

    def in_time(app: ASGIApp) -> ASGIApp:
        """Middleware: no request delays the shutdown of the gateway."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            started = asyncio.Event()

            async def send_on(message: Message) -> None:
                started.set()
                await send(message)

            await gateway.in_time(app(scope, receive, send_on), started)

        return answer

    settings = gateway.settings
    app = Litestar(
        route_handlers=[
            jobs.submit,
            jobs.list_jobs,
            jobs.details,
            jobs.status,
            jobs.events,
            jobs.cancel,
            jobs.cancel_several,
            dead.letters,
            dead.letter,
            dead.retry,
            dead.drop,
            dead.retry_several,
            dead.drop_several,
            fleet.queue,
            fleet.inferers,
            fleet.set_concurrency,
            openai.chat_completions,
            openai.completions,
            openai.embeddings,
            openai.rerank,
            responses.create,
            responses.retrieve,
            responses.cancel,
            responses.delete_response,
            responses.input_items,
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
            SluiceError: handle_sluice_error,
            HTTPException: handle_http_exception,
            ClientDisconnected: handle_client_disconnected,
            Exception: handle_crash,
        },
        middleware=[request_end_middleware, in_time],
        before_send=[_complete_headers],
        logging_config=None,  # structlog is set up for the whole process
        plugins=[StructSchemaPlugin()],
        openapi_config=OpenAPIConfig(
            title="Sluice",
            version=__version__,
            use_handler_docstrings=True,
            render_plugins=[DocumentPage()],
        ),
        signature_types=[Gateway, OpenStreams],
        cors_config=CORSConfig(
            allow_origins=settings.origins,
            expose_headers=["location", "retry-after", "preference-applied", REQUEST_ID],
        )
        if settings.origins
        else None,
    )
    return OriginCheck(app, [settings.host, *settings.host_names], settings.origins)


async def _complete_headers(message: Message, scope: Scope) -> None:
    """Return the client's request id, or a new one; and complete the header ``Allow``."""
    if message["type"] == "http.response.start":
        headers = MutableScopeHeaders.from_message(message)
        client_id = Headers.from_scope(scope).get(REQUEST_ID, "")[:128]
        headers[REQUEST_ID] = client_id or new_job_id()
        if "allow" in headers:
            headers["allow"] = allowed_methods(scope)
