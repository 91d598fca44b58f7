"""Who is at the other end, and for how long: preferences, hang-ups, shutdown."""

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from litestar import Request
from litestar.params import Parameter
from msgspec import Struct

from services.gateway.streams import GatewayStopping
from shared import subjects
from shared.errors import InvalidRequest

T = TypeVar("T")

IdempotencyKey = Annotated[
    str | None,
    Parameter(
        header=subjects.HEADER_IDEMPOTENCY_KEY,
        required=False,
        description="For 24 h the same key gives the same job, which no hang-up cancels.",
    ),
]


class ClientGone(Exception):
    """The client hung up before its answer was there."""


class Preferences(Struct, frozen=True):
    """The header ``Prefer`` (RFC 7240), as far as it concerns us."""

    wait_s: float | None = None
    respond_async: bool = False

    @classmethod
    def of(cls, request: Request[Any, Any, Any]) -> "Preferences":
        """Raises: InvalidRequest: ``wait`` is no number of seconds."""
        wait_s, respond_async = None, False
        for header in request.headers.getall("prefer", []):
            for preference in header.split(","):
                name, _, value = preference.partition(";")[0].partition("=")
                name, value = name.strip().lower(), value.strip().strip('"')
                if name == "respond-async":
                    respond_async = True
                elif name == "wait":
                    if not value.isascii() or not value.isdecimal():
                        raise InvalidRequest(f"Prefer: wait={value}: give whole seconds, wait=30")
                    wait_s = float(value)
        return cls(wait_s, respond_async)

    @property
    def applied(self) -> dict[str, str]:
        """The header ``Preference-Applied``."""
        applied = ["respond-async"] if self.respond_async else []
        if self.wait_s is not None:
            applied.append(f"wait={self.wait_s:.0f}")
        return {"preference-applied": ", ".join(applied)} if applied else {}


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
        for task in waiting:
            task.cancel()


async def _disconnected(request: Request[Any, Any, Any]) -> None:
    # The body has been read, so the next event there can be is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
