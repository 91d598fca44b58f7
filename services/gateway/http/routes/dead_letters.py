"""`/dead`: list, show, retry and drop dead letters."""

from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from services.gateway.gateway import Gateway
from services.gateway.http.caller import caller_of
from services.gateway.http.errors import error_responses
from shared.wire.api import DeadLetterHead, DeadLetterPage, JobAccepted
from shared.wire.listing import BulkDeadRequest, BulkReport
from shared.wire.results import DeadLetter

PAGE = 50


@get("/dead", responses=error_responses())
async def letters(
    gateway: NamedDependency[Gateway],
    limit: Annotated[
        int, QueryParameter(ge=1, le=200, description="Maximum number of dead letters.")
    ] = PAGE,
    before: Annotated[
        int | None, QueryParameter(ge=1, description="`before` of the previous page.")
    ] = None,
) -> DeadLetterPage:
    """Dead letters, the newest first: requests that failed for good, with the reason. They are kept
    for 7 days.

    A page of large requests has fewer items than its limit. If `before` is not null, another page
    follows. Like `GET /jobs`, it depends on `GATEWAY_LIST_JOBS`.
    """
    gateway.require_ready()
    gateway.job_list.require_allowed()
    return await gateway.dead_letters.page(limit, before)


@get("/dead/{job_id:str}", responses=error_responses(404))
async def letter(job_id: FromPath[str], gateway: NamedDependency[Gateway]) -> DeadLetter:
    """One dead letter, with the request as it was received."""
    gateway.require_ready()
    return await gateway.dead_letters.show(job_id)


@post(
    "/dead/{job_id:str}/retry",
    status_code=202,
    responses=error_responses(404, 409, 410, 413, 422, 429),
)
async def retry(
    request: Request[Any, Any, Any], job_id: FromPath[str], gateway: NamedDependency[Gateway]
) -> Response[JobAccepted]:
    """Send the request again as a new job with `retry_of`. The dead letter is removed."""
    gateway.require_ready()
    accepted = await gateway.dead_letters.retry(job_id, caller_of(request, "retry"))
    return Response(accepted, status_code=202, headers={"location": accepted.status_url})


@delete("/dead/{job_id:str}", status_code=200, responses=error_responses(404))
async def drop(job_id: FromPath[str], gateway: NamedDependency[Gateway]) -> DeadLetterHead:
    """Delete a dead letter."""
    gateway.require_ready()
    return await gateway.dead_letters.drop(job_id)


@post("/dead/retry", status_code=200, responses=error_responses(413))
async def retry_several(
    request: Request[Any, Any, Any],
    data: JSONBody[BulkDeadRequest],
    gateway: NamedDependency[Gateway],
) -> BulkReport:
    """Send the requests of several dead letters again as new jobs: those with these `ids`, or those
    that match `where`, the newest first. An empty `where` is refused."""
    gateway.require_ready()
    return await gateway.bulk.retry(data, caller_of(request, "retry"))


@post("/dead/drop", status_code=200, responses=error_responses(413))
async def drop_several(
    data: JSONBody[BulkDeadRequest], gateway: NamedDependency[Gateway]
) -> BulkReport:
    """Delete several dead letters: those with these `ids`, or those that match `where`, the newest
    first. An empty `where` is refused."""
    gateway.require_ready()
    return await gateway.bulk.drop(data)
