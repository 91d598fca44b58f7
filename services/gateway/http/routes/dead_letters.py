"""Dead letters over HTTP: list, show, retry, drop."""

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.params import Parameter

from services.gateway.gateway import Gateway
from services.gateway.http.errors import refusals
from shared.wire.api import DeadLetterHead, DeadLetterPage, JobAccepted
from shared.wire.results import DeadLetter

PAGE = 50


@get("/dead", responses=refusals())
async def letters(
    gateway: Gateway,
    limit: Annotated[int, Parameter(ge=1, le=200, description="Most letters to list.")] = PAGE,
    before: Annotated[
        int | None, Parameter(ge=1, description="`before` of the page that came before.")
    ] = None,
) -> DeadLetterPage:
    """Requests that failed for good, the newest first, with the reason. Kept for 7 days.

    A page of large requests is shorter than its limit; `before` says whether another one follows.
    """
    gateway.require_ready()
    return await gateway.dead_letters.page(limit, before)


@get("/dead/{job_id:str}", responses=refusals(404))
async def letter(job_id: str, gateway: Gateway) -> DeadLetter:
    """One dead letter, with the request as it was received."""
    gateway.require_ready()
    return await gateway.dead_letters.show(job_id)


@post(
    "/dead/{job_id:str}/retry",
    status_code=202,
    responses=refusals(404, 409, 410, 413, 422, 429),
)
async def retry(job_id: str, gateway: Gateway) -> Response[JobAccepted]:
    """Send the request again, as a new job with `retry_of`; the dead letter is removed."""
    gateway.require_ready()
    accepted = await gateway.dead_letters.retry(job_id)
    return Response(accepted, status_code=202, headers={"location": accepted.status_url})


@delete("/dead/{job_id:str}", status_code=200, responses=refusals(404))
async def drop(job_id: str, gateway: Gateway) -> DeadLetterHead:
    """Remove a dead letter for good."""
    gateway.require_ready()
    return await gateway.dead_letters.drop(job_id)
