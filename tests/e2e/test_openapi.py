"""The OpenAPI document says what the gateway does."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Stack

NO_ICON = "data:,"
TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body"),
    *("h1", "h2", "h3", "p", "a", "code", "pre", "table", "tr", "th", "td"),
}
"""None of them loads anything, except `link`."""


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


def test_the_page_of_the_routes_loads_nothing(
    shared_stack: Stack, document: dict[str, Any]
) -> None:
    """It contains all routes and schemas, and links only to them and to the document."""
    answer = shared_stack.http.get("/schema")
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.text
    assert set(re.findall(r"<([a-z]+[0-9]?)", page)) <= TAGS
    assert not re.search(r"url\(|@import", page)
    links = [unescape(link) for link in re.findall(r'href="([^"]*)"', page)]
    ids = {unescape(name) for name in re.findall(r'id="([^"]*)"', page)}
    assert {link for link in links if not link.startswith("#")} == {NO_ICON, "/schema/openapi.json"}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert {f"/components/schemas/{name}" for name in document["components"]["schemas"]} <= ids
    assert _routes(document) == _shown_routes(page)


def test_a_browser_without_a_network_shows_the_routes(
    shared_stack: Stack, document: dict[str, Any], tmp_path: Path
) -> None:
    """The page is complete when no host name can be resolved, and requests nothing else."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    log = tmp_path / "requests.json"
    shown = subprocess.run(
        [
            chromium,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"),
            *("--dump-dom", f"{shared_stack.url}/schema"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert _routes(document) == _shown_routes(shown)
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    requests = {(event["initiator"], event["url"]) for event in events if "initiator" in event}
    assert f"{shared_stack.url}/schema" in {url for _, url in requests}
    # The others have no origin: the browser itself opens the page and looks for updates.
    assert not {url for initiator, url in requests if initiator == shared_stack.url}


def _routes(document: dict[str, Any]) -> set[str]:
    return {
        f"{method.upper()} {path}"
        for path, operations in document["paths"].items()
        for method in operations
    }


def _shown_routes(page: str) -> set[str]:
    return {unescape(text) for text in re.findall(r"<h3[^>]*>([A-Z]+ /[^<]*)</h3>", page)}


def test_the_sites_of_the_framework_are_not_offered(shared_stack: Stack) -> None:
    """They load scripts, fonts and icons from other hosts."""
    for name in ("redoc", "swagger", "elements", "rapidoc", "scalar"):
        assert shared_stack.http.get(f"/schema/{name}").status_code == 404


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
