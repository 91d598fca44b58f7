"""Error responses: problem+json, and OpenAI's form under /v1."""

from collections.abc import Mapping
from typing import Any

from litestar import Request, Response
from litestar.enums import MediaType
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from msgspec import UNSET, Struct, UnsetType

from services.gateway.http.methods import allowed_methods, path_error
from services.gateway.statuses import status_of
from services.gateway.validation.wording import invalid_parameter
from shared.errors import SluiceError
from shared.logs import logger

TITLES = {
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    414: "URI Too Long",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

OUTAGE_RETRY_AFTER_S = 2
"""``Retry-After`` while the broker is away, for an unknown time."""
NO_HEADERS: Mapping[str, str] = {}
OPENAI_PREFIX = "/v1/"
OPENAI_KINDS = {429: "rate_limit_error"}

log = logger()


class Problem(Struct, frozen=True, kw_only=True):
    """Problem details (RFC 9457). ``code`` is an extension, and stable. ``param`` names the invalid
    field; ``state`` is the state of a job that had ended before it could be cancelled."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str
    code: str
    param: str | UnsetType = UNSET
    state: str | UnsetType = UNSET


class OpenAIErrorBody(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(Struct, frozen=True):
    error: OpenAIErrorBody


PROBLEM_JSON = "application/problem+json"

ERROR_DESCRIPTIONS = {
    400: "the request is invalid",
    403: "from a web page of another origin, with an unknown host name, or not allowed here",
    404: "unknown job, model, inferer or dead letter",
    408: "the request took too long to arrive",
    409: "the job has already ended (see `state`), or the dead letter has no valid request",
    410: "the job is older than the retention of results",
    413: "the body is too large",
    414: "the URL is too long",
    422: "the idempotency key was used with another request",
    429: "the queue is full; see Retry-After",
    431: "the request head is too large",
    500: "internal error of the gateway, or the job failed",
    503: "the broker is away or short of storage; see Retry-After",
    504: "the deadline passed before the job was done",
}
COMMON_STATUSES = (400, 403, 408, 414, 431, 500, 503)


def error_responses(*statuses: int) -> dict[int, ResponseSpec]:
    """The error responses of a route, for the OpenAPI document: ``statuses``, and those that every
    route has."""
    return {
        status: ResponseSpec(
            Problem,
            description=ERROR_DESCRIPTIONS[status],
            media_type=PROBLEM_JSON,
            generate_examples=False,
        )
        for status in sorted({*COMMON_STATUSES, *statuses})
    }


def openai_error_responses(*statuses: int) -> dict[int, ResponseSpec]:
    """As `error_responses`, in OpenAI's form, for the routes under ``/v1``."""
    return {
        status: ResponseSpec(
            OpenAIError, description=ERROR_DESCRIPTIONS[status], generate_examples=False
        )
        for status in sorted({*COMMON_STATUSES, *statuses})
    }


def handle_sluice_error(request: Request[Any, Any, Any], error: SluiceError) -> Response[Any]:
    """The response for one of Sluice's errors."""
    status = status_of(error)
    retry_after_s = getattr(error, "retry_after_s", OUTAGE_RETRY_AFTER_S)
    return _respond(
        request,
        status,
        error.code,
        error.message,
        {"retry-after": str(retry_after_s)} if status in (429, 503) else {},
        param=getattr(error, "param", None),
        state=getattr(error, "state", UNSET),
    )


def handle_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """The response for errors of the framework: no such route, wrong method, bad parameter."""
    status = error.status_code
    if isinstance(error, ValidationException) and isinstance(error.extra, list) and error.extra:
        wrong = invalid_parameter(error.extra[0]["key"], error.extra[0]["message"])
        return _respond(request, status, wrong.code, wrong.message, param=wrong.param)
    code = "invalid_request" if status == 400 else TITLES.get(status, "error").lower()
    detail, headers = error.detail or TITLES[500], {}
    if status in (404, 405):
        allowed = allowed_methods(request.scope) if status == 405 else ""
        detail = path_error(request.scope, allowed)
        headers = {"allow": allowed} if allowed else {}
    return _respond(request, status, code.replace(" ", "_"), detail, headers)


def handle_crash(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """The response for an unexpected exception, which is logged and not shown."""
    log.error("request_crashed", path=request.scope["path"], exc_info=error)
    return _respond(request, 500, "internal_error", "internal error of the gateway; see its log")


def error_body(
    path: str,
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    state: str | UnsetType = UNSET,
) -> tuple[Problem | OpenAIError, str]:
    """An error in the form of the API that ``path`` belongs to, and its media type."""
    if path.startswith(OPENAI_PREFIX):
        return openai_error(status, code, message, param), MediaType.JSON
    problem = Problem(
        title=TITLES.get(status, "Error"),
        status=status,
        detail=message,
        instance=path,
        code=code,
        param=UNSET if param is None else param,
        state=state,
    )
    return problem, PROBLEM_JSON


def openai_error(status: int, code: str, message: str, param: str | None = None) -> OpenAIError:
    kind = OPENAI_KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return OpenAIError(OpenAIErrorBody(message=message, type=kind, param=param, code=code))


def _respond(
    request: Request[Any, Any, Any],
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] = NO_HEADERS,
    *,
    param: str | None = None,
    state: str | UnsetType = UNSET,
) -> Response[Any]:
    body, media_type = error_body(
        request.scope["path"], status, code, message, param=param, state=state
    )
    return Response(body, status_code=status, headers=headers, media_type=media_type)
