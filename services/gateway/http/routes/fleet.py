"""The queue and the inferers over HTTP: read them, and set how many jobs run at once."""

from litestar import get, put

from services.gateway.gateway import Gateway
from services.gateway.http.errors import refusals
from shared.wire.api import ConcurrencyReport, ConcurrencyRequest, FleetReport, QueueReport


@get("/queue", responses=refusals())
async def queue(gateway: Gateway) -> QueueReport:
    """For each model: jobs waiting and in flight, the limit, live inferers, the oldest's age."""
    gateway.require_ready()
    return await gateway.jobs.queue()


@get("/inferers", responses=refusals())
async def inferers(gateway: Gateway) -> FleetReport:
    """Each live inferer: its model, slots, CPUs and speed, and the jobs it runs now."""
    gateway.require_ready()
    return await gateway.fleet.report()


@put("/concurrency", responses=refusals(404, 413))
async def set_concurrency(data: ConcurrencyRequest, gateway: Gateway) -> ConcurrencyReport:
    """Open or close slots of live inferers, without a restart and without touching running jobs.
    For all of them, those of a `model`, or one `inferer`. With 0 they take no more jobs."""
    gateway.require_ready()
    return await gateway.fleet.set_concurrency(data)
