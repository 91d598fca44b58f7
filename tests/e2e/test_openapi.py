"""The OpenAPI document says what the gateway does."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.processes import Stack


@pytest.fixture(scope="module")
def document(shared_stack: Stack) -> dict[str, Any]:
    answer = shared_stack.http.get("/schema/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/jobs", "GET, OPTIONS, POST"),
        ("/status/x", "GET, OPTIONS"),
        ("/dead/x", "DELETE, GET, OPTIONS"),
        ("/dead/x/retry", "OPTIONS, POST"),
        ("/v1/models/org/name", "GET, OPTIONS"),
        ("/concurrency", "OPTIONS, PUT"),
    ],
)
def test_a_405_and_options_name_the_methods_of_a_path(
    shared_stack: Stack, path: str, methods: str
) -> None:
    """A 405 says which there are (RFC 9110), as the answer to OPTIONS does, in the form of its
    route."""
    refused = shared_stack.http.request("PATCH", path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
    error = refused.json()
    code = error["error"]["code"] if path.startswith("/v1/") else error["code"]
    assert code == "method_not_allowed"
    assert shared_stack.http.options(path).headers["allow"] == methods


def test_every_status_is_documented(document: dict[str, Any]) -> None:
    """Also those that only some requests get, and those that every route may answer."""
    expected = {
        ("post", "/jobs"): {200, 202, 404, 410, 413, 422, 429},
        ("get", "/status/{job_id}"): {200, 404, 410},
        ("get", "/jobs/{job_id}/events"): {200, 204, 404, 410},
        ("delete", "/jobs/{job_id}"): {200, 404, 409, 410},
        ("get", "/v1/models/{model}"): {200, 404},
        ("post", "/v1/completions"): {200, 404, 409, 410, 413, 422, 429, 504},
        ("post", "/v1/embeddings"): {200, 404, 409, 410, 413, 422, 429, 504},
        ("post", "/v1/rerank"): {200, 404, 409, 410, 413, 422, 429, 504},
        ("get", "/readyz"): {200},
    }
    always = {400, 403, 408, 414, 431, 500, 503}
    for (method, path), statuses in expected.items():
        responses = document["paths"][path][method]["responses"]
        assert {int(status) for status in responses} == statuses | always, path


def test_errors_are_documented_in_the_form_that_is_sent(document: dict[str, Any]) -> None:
    """OpenAI's under /v1, RFC 9457 elsewhere; streams as what they are."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if int(status) < 400:
                    continue
                media_type, name = (
                    ("application/json", "OpenAIError")
                    if path.startswith("/v1/")
                    else ("application/problem+json", "Problem")
                )
                assert content.keys() == {media_type}, (path, status)
                reference = content[media_type]["schema"]["$ref"]
                assert reference == f"#/components/schemas/{name}"
    events = document["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert events.keys() == {"text/event-stream"}
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert chat.keys() == {"application/json", "text/event-stream"}


def test_bounds_of_fields_that_may_be_null(document: dict[str, Any]) -> None:
    """None is lost: neither an exclusive one nor that of a list, nor that nothing else is taken."""
    submission = document["components"]["schemas"]["JobSubmission"]
    assert submission["additionalProperties"] is False
    fields = submission["properties"]
    timeout, null = fields["timeout_s"]["oneOf"]
    assert (timeout["exclusiveMinimum"], timeout["maximum"]) == (0, 86_400)
    assert null == {"type": "null"}
    assert fields["repeat_penalty"]["exclusiveMinimum"] == 0
    assert fields["messages"]["oneOf"][0]["minItems"] == 1
    biases, _ = fields["logit_bias"]["oneOf"]
    assert biases["maxProperties"] == 1024
    assert biases["additionalProperties"]["minimum"] == -100
    assert biases["propertyNames"] == {"pattern": "^[0-9]{1,10}$"}
    assert fields["metadata"]["oneOf"][0]["type"] == "object"


def test_of_the_schemas_of_a_union_only_one_matches(document: dict[str, Any]) -> None:
    """``oneOf`` refuses what two of them accept: 5 is both an integer and a number."""

    def unions(node: Any) -> Iterator[list[dict[str, Any]]]:
        if isinstance(node, dict):
            if isinstance(node.get("oneOf"), list):
                yield node["oneOf"]
            node = list(node.values())
        if isinstance(node, list):
            for part in node:
                yield from unions(part)

    def kind(schema: dict[str, Any]) -> str | None:
        name = schema.get("type")
        return "number" if name == "integer" else name

    for union in unions(document):
        # Objects differ in their fields, values are listed.
        types = [schema for schema in union if not schema.keys() & {"enum", "const"}]
        kinds = [kind(schema) for schema in types if kind(schema) not in (None, "object")]
        assert len(set(kinds)) == len(kinds), union
