"""Requests whose client disconnects, or whose gateway shuts down, while they are handled."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from litestar import Request, Response
from litestar.params import HeaderParameter

from services.gateway.http.sse import GatewayStopping
from shared.background import drop, first_of
from shared.wire import subjects

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name=subjects.HEADER_IDEMPOTENCY_KEY,
        required=False,
        schema_extra={"pattern": "^[ -~]{1,255}$"},
        description="For 24 h, the same key returns the same job. The job continues if the client "
        "disconnects.",
    ),
]


class ClientDisconnected(Exception):
    """The client disconnected before it got its response."""


def handle_client_disconnected(_: Request[Any, Any, Any], __: ClientDisconnected) -> Response[None]:
    return Response(None, status_code=499)


async def require_connected(request: Request[Any, Any, Any]) -> None:
    """Check that the client is still there. Call this before starting work that only this client
    waits for: when a busy gateway gets to a request, its client may have given up long ago.

    Raises:
        ClientDisconnected.
    """
    # The event loop sees the request in one iteration and the end of the connection in the next.
    await asyncio.sleep(0)
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            await _disconnected(request)
            raise ClientDisconnected


async def while_connected(
    request: Request[Any, Any, Any],
    stopping: asyncio.Event,
    work: Awaitable[T],
    timeout_s: float | None = None,
) -> T:
    """The result of ``work``, unless the client disconnects or this gateway shuts down first.

    Raises:
        ClientDisconnected, GatewayStopping, TimeoutError.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.create_task(_disconnected(request), name="watch a client")
    try:
        await first_of(working, disconnected, stopping, timeout_s=timeout_s)
        if working.done():
            return working.result()
        if disconnected.done():
            raise ClientDisconnected
        if stopping.is_set():
            raise GatewayStopping
        raise TimeoutError
    finally:
        drop(working, disconnected)


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    # The body has been read, so the only event left is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
