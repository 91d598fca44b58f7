"""How the routes under `/v1` answer when a job does not complete."""

from typing import Any

from litestar import Response

from services.gateway.http.errors import OpenAIError, openai_error
from services.gateway.jobs.accepted import AcceptedJob
from shared.wire.api import JobError
from shared.wire.results import Cancelled, Expired, Failed

STATUS_BY_CODE = {
    **dict.fromkeys(("invalid_request", "prompt_too_long", "result_too_large"), 400),
    **dict.fromkeys(("job_not_found", "job_aged_out"), 404),
    **dict.fromkeys(("cancelled", "client_disconnected"), 409),
    **dict.fromkeys(("deadline_passed", "timed_out"), 504),
}
"""The status for a job that ended with this code; 500 for any other."""

# The official client would repeat the request on 409 and 5xx, and run the job twice.
NO_RETRY = {"x-should-retry": "false"}


def failure(why: JobError | Failed | Cancelled | Expired, item: str = "") -> Response[Any]:
    """The response for a job that did not complete. Its message begins with ``item``."""
    status = STATUS_BY_CODE.get(why.code, 500)
    return Response(error_of(why, item), status_code=status, headers=NO_RETRY)


def error_of(why: JobError | Failed | Cancelled | Expired, item: str = "") -> OpenAIError:
    return openai_error(STATUS_BY_CODE.get(why.code, 500), why.code, item + why.message)


def stopping(accepted: AcceptedJob) -> Response[Any]:
    """The response when this gateway shuts down."""
    return Response(stopping_error(accepted), status_code=503, headers=NO_RETRY)


def stopping_error(accepted: AcceptedJob) -> OpenAIError:
    return openai_error(
        503,
        "gateway_stopping",
        f"this gateway is shutting down; the job continues: see /status/{accepted.id}",
    )
