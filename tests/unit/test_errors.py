"""Every error of Sluice: its status, its code, and its two forms over HTTP."""

import json
from typing import Any

import msgspec
import pytest
from litestar import Litestar
from litestar.response import Response
from litestar.testing import RequestFactory

from services.gateway.http.errors import TITLES, error_body, handle_sluice_error, openai_error
from services.gateway.statuses import status_of
from shared import errors
from shared.errors import AlreadyFinished, InvalidRequest, QueueFull, SluiceError

TABLE = {
    "AlreadyFinished": (409, "already_finished", "invalid_request_error"),
    "BrokerUnavailable": (503, "broker_unavailable", "server_error"),
    "CannotRetry": (409, "cannot_retry", "invalid_request_error"),
    "CommandRefused": (500, "refused", "server_error"),
    "InvalidAnswer": (500, "model_error", "server_error"),
    "InvalidRequest": (400, "invalid_request", "invalid_request_error"),
    "JobAgedOut": (410, "job_aged_out", "invalid_request_error"),
    "KeyReused": (422, "idempotency_key_reused", "invalid_request_error"),
    "ListingRefused": (403, "listing_refused", "invalid_request_error"),
    "ModelError": (500, "model_error", "server_error"),
    "NotFinished": (409, "not_finished", "invalid_request_error"),
    "OutOfMemory": (500, "out_of_memory", "server_error"),
    "Overloaded": (503, "overloaded", "server_error"),
    "PromptTooLong": (400, "prompt_too_long", "invalid_request_error"),
    "QueueFull": (429, "queue_full", "rate_limit_error"),
    "RequestTooLarge": (413, "request_too_large", "invalid_request_error"),
    "SettingsError": (500, "invalid_settings", "server_error"),
    "SluiceError": (500, "internal_error", "server_error"),
    "StateChanged": (409, "state_changed", "invalid_request_error"),
    "StorageShort": (503, "storage_short", "server_error"),
    "StoredAlready": (500, "internal_error", "server_error"),
    "StreamRefused": (503, "stream_refused", "server_error"),
    "TooManyStreams": (503, "too_many_streams", "server_error"),
    "TopologyError": (500, "incompatible_topology", "server_error"),
    "UnknownDeadLetter": (404, "letter_not_found", "invalid_request_error"),
    "UnknownInferer": (404, "inferer_not_found", "invalid_request_error"),
    "UnknownJob": (404, "job_not_found", "invalid_request_error"),
    "UnknownModel": (404, "model_not_found", "invalid_request_error"),
    "UnknownResponse": (404, "response_not_found", "invalid_request_error"),
}
"""Status, code, and OpenAI's type: what clients see, so a change here is a change for them."""


ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, SluiceError)
]


def an_error(kind: type[SluiceError]) -> SluiceError:
    if issubclass(kind, QueueFull):
        return kind("why", 7)
    if issubclass(kind, AlreadyFinished):
        return kind("why", "SUCCESS")
    return kind("why")


def response_to(error: SluiceError, path: str) -> tuple[Response[Any], dict[str, Any]]:
    """What the gateway answers on ``path``, and its body as JSON."""
    # Litestar's own logging would be set for all tests that follow in this process.
    factory = RequestFactory(app=Litestar(logging_config=None))
    response = handle_sluice_error(factory.get(path), error)
    return response, json.loads(msgspec.json.encode(response.content))


def test_every_error_has_its_line_in_the_table() -> None:
    assert {kind.__name__ for kind in ERRORS} == TABLE.keys()


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_has_its_status_its_code_and_its_openai_form(kind: type[SluiceError]) -> None:
    """As problem+json outside /v1, and as OpenAI's clients read it below."""
    status, code, openai_type = TABLE[kind.__name__]
    error = an_error(kind)
    assert status_of(error) == status
    response, problem = response_to(error, "/jobs")
    assert (response.status_code, response.media_type) == (status, "application/problem+json")
    assert (problem["status"], problem["code"], problem["detail"]) == (status, code, "why")
    assert (problem["title"], problem["instance"]) == (TITLES[status], "/jobs")
    response, body = response_to(error, "/v1/chat/completions")
    assert (response.status_code, response.media_type) == (status, "application/json")
    assert body == {"error": {"message": "why", "type": openai_type, "param": None, "code": code}}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_client_that_may_come_again_learns_when(kind: type[SluiceError]) -> None:
    """Retry-After with 429 and 503, and with no other status."""
    response, _ = response_to(an_error(kind), "/jobs")
    printed = response.headers.get("retry-after")
    assert (printed is not None) == (response.status_code in (429, 503))
    assert printed is None or int(printed) >= 1


def test_details_of_an_error_are_in_its_body() -> None:
    """The invalid field in both forms; the state of a job in ours; fields without value in none."""
    error = InvalidRequest("why", "messages[0]")
    assert response_to(error, "/jobs")[1]["param"] == "messages[0]"
    assert response_to(error, "/v1/completions")[1]["error"]["param"] == "messages[0]"
    _, problem = response_to(AlreadyFinished("why", "SUCCESS"), "/jobs/1")
    assert problem["state"] == "SUCCESS"
    assert "param" not in problem
    assert "state" not in response_to(InvalidRequest("why"), "/jobs")[1]


def test_a_queue_full_says_when_to_come_again() -> None:
    response, _ = response_to(QueueFull("why", 7), "/jobs")
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("path", ["/v1", "/v1beta/models", "/jobs/v1/"])
def test_only_paths_below_v1_get_openais_form(path: str) -> None:
    _, media_type = error_body(path, 404, "not_found", "why")
    assert media_type == "application/problem+json"


def test_openais_type_follows_the_status() -> None:
    kinds = {status: openai_error(status, "c", "m").error.type for status in TITLES}
    assert {kind for status, kind in kinds.items() if status >= 500} == {"server_error"}
    assert kinds.pop(429) == "rate_limit_error"
    assert {kind for status, kind in kinds.items() if status < 500} == {"invalid_request_error"}
