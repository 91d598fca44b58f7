"""The caller of an HTTP request."""

from typing import Any

from litestar import Request

from services.gateway.jobs.caller import Caller
from shared.wire.api import CLI_USER_AGENT
from shared.wire.requests import Via
from shared.wire.trace import trace_of


def caller_of(request: Request[Any, Any, Any], via: Via = "http") -> Caller:
    """``via`` is that of the route; the command line says in its ``User-Agent`` what it is."""
    if via == "http" and request.headers.get("user-agent", "").startswith(CLI_USER_AGENT):
        via = "cli"
    return Caller(via, trace=trace_of(request.headers))
