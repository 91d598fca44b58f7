"""Whether this gateway lives, and whether it can serve."""

from litestar import get
from msgspec import Struct

from services.gateway.gateway import Gateway
from services.gateway.http.errors import refusals
from shared import __version__


class Health(Struct, frozen=True):
    status: str
    version: str = __version__


@get("/healthz", responses=refusals())
async def healthz() -> Health:
    """200 as long as the process answers."""
    return Health("alive")


@get("/readyz", responses=refusals())
async def readyz(gateway: Gateway) -> Health:
    """200 while requests are served; 503 while the broker is away, or cannot write its disk."""
    gateway.require_fit()
    return Health("ready")
