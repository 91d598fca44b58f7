"""How a request under `/v1` gets a job: a new one, that of its idempotency key, or its orphan."""

from typing import Any

from litestar import Request

from services.gateway.gateway import Gateway
from services.gateway.http.caller import caller_of
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import require_connected
from services.gateway.jobs.accepted import AcceptedJob
from shared.wire.api import JobSubmission


async def accept(
    request: Request[Any, Any, Any],
    gateway: Gateway,
    submission: JobSubmission,
    attempt: ClientAttempt,
    key: str | None,
    *,
    may_return: bool,
) -> AcceptedJob:
    """The job for a client that waits for it. ``may_return``: the client may have timed out and
    retried; then it gets the job that it was waiting for.

    Raises:
        ClientDisconnected; see `Idempotency.submit` for more.
    """
    caller = caller_of(request, "openai")
    if may_return and attempt.is_retry:
        adopted = await gateway.orphans.adopt(submission, caller)
        if adopted is not None:
            return adopted
        await require_connected(request)  # it may be gone after the wait for an orphan
    return await gateway.idempotency.submit(submission, caller, key)
