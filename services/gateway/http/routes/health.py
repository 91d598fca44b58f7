"""`/healthz` and `/readyz`."""

from litestar import get
from litestar.di import NamedDependency
from msgspec import Struct

from services.gateway.gateway import Gateway
from services.gateway.http.errors import error_responses
from shared import __version__


class Health(Struct, frozen=True):
    status: str
    version: str = __version__


@get("/healthz", responses=error_responses())
async def healthz() -> Health:
    """200 while the process is alive."""
    return Health("alive")


@get("/readyz", responses=error_responses())
async def readyz(gateway: NamedDependency[Gateway]) -> Health:
    """200 while requests can be served; 503 while the broker is unavailable or cannot write."""
    gateway.require_fit()
    return Health("ready")
