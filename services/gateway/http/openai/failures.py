"""How the routes under `/v1` answer when a job does not complete."""

from collections.abc import Callable
from typing import Any

from litestar import Response

from services.gateway.http.errors import OpenAIError, openai_error
from services.gateway.jobs.accepted import AcceptedJob
from shared.errors import InvalidRequest
from shared.wire.api import JobError

STATUS_BY_CODE = {
    **dict.fromkeys(("invalid_request", "prompt_too_long", "result_too_large"), 400),
    **dict.fromkeys(("job_not_found", "job_aged_out"), 404),
    **dict.fromkeys(("cancelled", "client_disconnected"), 409),
    **dict.fromkeys(("deadline_passed", "timed_out"), 504),
}
"""The status for a job that ended with this code; 500 for any other."""

# The official client would repeat the request on 409 and 5xx, and run the job twice.
NO_RETRY = {"x-should-retry": "false"}


AsSent = Callable[[InvalidRequest], InvalidRequest]
"""Replaces the name of a job's field in an error by that of the parameter that set it."""


def failure(why: JobError, as_sent: AsSent, item: str = "") -> Response[Any]:
    """The response for a job that did not complete: the one for the ``item`` of a list of prompts,
    such as ``prompt[1]``."""
    status = STATUS_BY_CODE.get(why.code, 500)
    return Response(error_of(why, as_sent, item), status_code=status, headers=NO_RETRY)


def error_of(why: JobError, as_sent: AsSent, item: str = "") -> OpenAIError:
    """The error of `failure`."""
    message, param = why.message, why.param or None
    if param is not None:
        sent = as_sent(InvalidRequest(message, param))
        message, param = sent.message, sent.param
    if item:
        message = f"{item}: {message}"
        param = item if param == item.partition("[")[0] else param
    return openai_error(STATUS_BY_CODE.get(why.code, 500), why.code, message, param)


def stopping(accepted: AcceptedJob) -> Response[Any]:
    """The response when this gateway shuts down."""
    return Response(stopping_error(accepted), status_code=503, headers=NO_RETRY)


def stopping_error(accepted: AcceptedJob) -> OpenAIError:
    return openai_error(
        503,
        "gateway_stopping",
        f"this gateway is shutting down; the job continues: see /status/{accepted.id}",
    )
