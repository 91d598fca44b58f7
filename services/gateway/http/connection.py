"""The client's end of a request: hang-ups, and the shutdown of this gateway."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from litestar import Request, Response
from litestar.params import Parameter

from services.gateway.http.sse import GatewayStopping
from shared.background import drop
from shared.wire import subjects

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    Parameter(
        header=subjects.HEADER_IDEMPOTENCY_KEY,
        required=False,
        schema_extra={"pattern": "^[ -~]{1,255}$"},
        description="For 24 h the same key gives the same job, which no hang-up cancels.",
    ),
]


class ClientGone(Exception):
    """The client hung up before its answer was there."""


def answer_nobody(_: Request[Any, Any, Any], __: ClientGone) -> Response[None]:
    return Response(None, status_code=499)


async def require_client(request: Request[Any, Any, Any]) -> None:
    """To be called before anything is begun that only the client of ``request`` waits for: a busy
    gateway gets to a request when its client may long have given up.

    Raises:
        ClientGone.
    """
    # The event loop reads the request in one turn, and in the next that the connection has ended.
    await asyncio.sleep(0)
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            await _disconnected(request)
            raise ClientGone


async def while_connected(
    request: Request[Any, Any, Any],
    stopping: asyncio.Event,
    work: Awaitable[T],
    timeout_s: float | None = None,
) -> T:
    """``work``'s result, if it comes before the client hangs up or this gateway stops.

    Raises:
        ClientGone, GatewayStopping, TimeoutError.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnected(request))
    stopped = asyncio.create_task(stopping.wait())
    waiting = (working, leaving, stopped)
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientGone
        if stopped.done():
            raise GatewayStopping
        raise TimeoutError
    finally:
        drop(*waiting)


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    # The body has been read, so the next event there can be is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
