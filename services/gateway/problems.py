"""Errors at the HTTP edge: one table of statuses, problem+json, and OpenAI's shape under /v1."""

from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from msgspec import UNSET, Struct, UnsetType

from shared.errors import (
    AlreadyFinished,
    BrokerUnavailable,
    InvalidRequest,
    JobAgedOut,
    NotFinished,
    RequestTooLarge,
    SluiceError,
    UnknownInferer,
    UnknownJob,
    UnknownModel,
)
from shared.logs import logger

STATUSES: dict[type[SluiceError], int] = {
    InvalidRequest: 400,
    UnknownModel: 404,
    UnknownInferer: 404,
    UnknownJob: 404,
    AlreadyFinished: 409,
    NotFinished: 409,
    JobAgedOut: 410,
    RequestTooLarge: 413,
    BrokerUnavailable: 503,
}

TITLES = {
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

RETRY_AFTER_S = 2
OPENAI_PREFIX = "/v1/"

log = logger()


class Problem(Struct, frozen=True, kw_only=True):
    """RFC 9457. ``code`` is ours and stable; ``param`` names the field to blame."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    code: str
    param: str | UnsetType = UNSET


class OpenAIErrorBody(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Struct, frozen=True):
    error: OpenAIErrorBody


PROBLEM = "application/problem+json"
REFUSED = {
    status: ResponseSpec(Problem, description=text, media_type=PROBLEM)
    for status, text in {
        400: "the request can never run as it stands",
        404: "no such job, model or inferer",
        410: "the job is older than results are kept",
        503: "the broker is away; see Retry-After",
    }.items()
}
"""What routes may answer instead, for the OpenAPI document."""


def status_of(error: SluiceError) -> int:
    """The HTTP status of ``error``; the NATS service uses the same."""
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return 500


def answer_error(request: Request[Any, Any, Any], error: SluiceError) -> Response[Any]:
    """The answer for one of our errors, in the shape that its route speaks."""
    return _respond(
        request, status_of(error), error.code, error.message, getattr(error, "param", None)
    )


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """The answer for what the framework refuses: no such route, wrong method, bad parameter."""
    status = error.status_code
    code = "invalid_request" if status == 400 else TITLES.get(status, "error").lower()
    return _respond(request, status, code.replace(" ", "_"), error.detail or TITLES[500], None)


def answer_crash(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The answer for a fault of ours: nothing of it is shown, all of it is logged."""
    log.error("request_crashed", path=request.url.path, exc_info=error)
    return _respond(request, 500, "internal_error", "a fault of the gateway; see its log", None)


def openai_error(status: int, code: str, message: str, param: str | None = None) -> OpenAIError:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return OpenAIError(OpenAIErrorBody(message=message, type=kind, param=param, code=code))


def _respond(
    request: Request[Any, Any, Any], status: int, code: str, message: str, param: str | None
) -> Response[Any]:
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == 503 else {}
    if request.url.path.startswith(OPENAI_PREFIX):
        return Response(
            openai_error(status, code, message, param), status_code=status, headers=headers
        )
    problem = Problem(
        title=TITLES.get(status, "Error"),
        status=status,
        detail=message,
        instance=request.url.path,
        code=code,
        param=UNSET if param is None else param,
    )
    return Response(problem, status_code=status, headers=headers, media_type=PROBLEM)
