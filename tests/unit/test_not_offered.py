"""The errors for paths that do not exist."""

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest

from services.gateway.gateway import Gateway
from services.gateway.http.app import create_app
from services.gateway.http.openai.not_offered import NOT_OFFERED
from services.gateway.settings import GatewaySettings
from shared.config import BrokerSettings

METHODS = {"_get_api_list": "GET"} | {
    f"_{name}": name.upper() for name in ("get", "post", "put", "patch", "delete")
}


def test_every_path_of_the_official_client_is_offered_or_explained() -> None:
    """In OpenAI's form, with a status after which the client does not send it again."""
    used = set()
    requests = list(_requests_of_the_client())
    assert len(requests) > 300
    for (method, path), answer in zip(requests, _answers(requests), strict=True):
        if answer.status_code in (400, 503):  # offered; here the gateway has no broker
            continue
        assert answer.status_code in (404, 405), (method, path, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        whys = [why for why in NOT_OFFERED.values() if why in error["message"]]
        assert whys, (method, path, error)
        used.update(whys)
        shown = path.partition("?")[0][:80]
        assert error["message"].startswith(f"{method} {shown} is not offered: ")
    assert used == {*NOT_OFFERED.values()}


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/responses/compact", 405, "shorten it yourself"),
        ("GET", "/v1/chat/completions", 405, "use /v1/responses, or GET /jobs to list jobs"),
        ("DELETE", "/v1/models/tiny", 405, "models come and go with their inferers"),
        ("POST", "/v1/chat/completion", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("GET", "/v1/zzz", 404, "there is no /v1/zzz; GET /schema lists all routes"),
        ("GET", "/job", 404, "did you mean /jobs?"),
        ("PUT", "/jobs", 405, "PUT is not possible for /jobs; use GET, OPTIONS, POST"),
        ("POST", "/v1/embeddings/x", 404, "there is no /v1/embeddings/x"),
    ],
)
def test_a_wrong_path_gets_a_hint(method: str, path: str, status: int, message: str) -> None:
    (answer,) = _answers([(method, path)])
    assert answer.status_code == status
    assert message in answer.text
    assert ("allow" in answer.headers) == (status == 405)


def _answers(requests: list[tuple[str, str]]) -> list[httpx2.Response]:
    async def send() -> list[httpx2.Response]:
        app = create_app(Gateway(GatewaySettings(), BrokerSettings()), on_fatal=lambda: None)
        transport = httpx2.ASGITransport(cast("Any", app))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path) for method, path in requests]

    return asyncio.run(send())


def _requests_of_the_client() -> Iterator[tuple[str, str]]:
    """Method and path of every call in the source of the installed client."""
    for file in (Path(openai.__file__).parent / "resources").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(
                    ast.Attribute(attr=name),
                    [ast.Constant(str(path)) | ast.Call(args=[ast.Constant(str(path)), *_]), *_],
                ) if name in METHODS:
                    # Some are templates, with their values.
                    yield METHODS[name], "/v1" + path.replace("{", "").replace("}", "")
