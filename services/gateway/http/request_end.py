"""What is to be done when a request has ended: answered, hung up on at any moment, or cut off.

A generator that streams an answer is no place for it: one that was never started, as its client had
gone before, runs no ``finally``.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from litestar import Request
from litestar.types import ASGIApp, Receive, Scope, Send

_KEY = "sluice_request_end"


def with_request_end(app: ASGIApp) -> ASGIApp:
    """A middleware that does it."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as end:
            scope["state"][_KEY] = end
            await app(scope, receive, send)

    return answer


def at_request_end(request: Request[Any, Any, Any], do: Callable[[], None]) -> None:
    """Call ``do`` when ``request`` has ended; what was given last comes first."""
    end: ExitStack = request.scope["state"][_KEY]
    end.callback(do)
