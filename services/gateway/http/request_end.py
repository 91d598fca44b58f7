"""Callbacks for the end of a request: it was answered, its client disconnected, or it was cut off.

A generator that streams a response is the wrong place for clean-up: if the client disconnects
before it starts, its ``finally`` never runs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from litestar import Request
from litestar.types import ASGIApp, Receive, Scope, Send

_KEY = "sluice_request_end"


def request_end_middleware(app: ASGIApp) -> ASGIApp:
    """Middleware that runs the callbacks."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as end:
            scope["state"][_KEY] = end
            await app(scope, receive, send)

    return answer


def on_request_end(request: Request[Any, Any, Any], callback: Callable[[], None]) -> None:
    """Call ``callback`` when ``request`` has ended. The last one registered is called first."""
    end: ExitStack = request.scope["state"][_KEY]
    end.callback(callback)
