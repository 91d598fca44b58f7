"""`/queue`, `/inferers` and `/concurrency`."""

from litestar import get, put
from litestar.di import NamedDependency
from litestar.params import JSONBody

from services.gateway.gateway import Gateway
from services.gateway.http.errors import error_responses
from shared.wire.api import ConcurrencyReport, ConcurrencyRequest, FleetReport, QueueReport


@get("/queue", responses=error_responses())
async def queue(gateway: NamedDependency[Gateway]) -> QueueReport:
    """For each model: jobs waiting and in flight, the limit, live inferers, age of the oldest."""
    gateway.require_ready()
    return await gateway.jobs.queue()


@get("/inferers", responses=error_responses())
async def inferers(gateway: NamedDependency[Gateway]) -> FleetReport:
    """Each live inferer: its model, slots, CPUs, speed and running jobs."""
    gateway.require_ready()
    return await gateway.fleet.report()


@put("/concurrency", responses=error_responses(404, 413))
async def set_concurrency(
    data: JSONBody[ConcurrencyRequest], gateway: NamedDependency[Gateway]
) -> ConcurrencyReport:
    """Open or close slots of live inferers: all, those of a `model`, or one `inferer`. No restart
    is needed, and running jobs continue. With 0, inferers take no more jobs."""
    gateway.require_ready()
    return await gateway.fleet.set_concurrency(data)
