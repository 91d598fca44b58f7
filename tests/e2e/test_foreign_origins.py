"""Web pages cannot use a gateway that its operator has not given to them."""

import json
from collections.abc import Iterator

import httpx2
import pytest

from tests.support.processes import Stack
from tests.support.wire import ask, get

PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway as it is by default."""
    with Stack(tmp_path_factory.mktemp("closed")) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        yield stack


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway with a name, which a page may use."""
    with Stack(tmp_path_factory.mktemp("opened")) as stack:
        gateway = stack.start_gateway(
            GATEWAY_MODELS="tiny",
            GATEWAY_ALLOWED_HOSTS="gateway, sluice.example",
            GATEWAY_ALLOWED_ORIGINS=f"{PAGE},https://app.example",
        )
        gateway.wait_for("gateway_ready")
        yield stack


def test_a_foreign_page_cannot_submit(closed: Stack) -> None:
    """A simple request needs no preflight: the gateway itself refuses it, and no job begins."""
    for origin in (
        "https://evil.example",
        "null",
        PAGE,
        f"{closed.url}.evil.example",
        closed.url.replace("http", "https"),
        "http://127.0.0.1",
        f"{closed.url}, {closed.url}",
        "file://",
        "b\u00fccher".encode().decode("latin-1"),
    ):
        headers = {b"origin": origin.encode("latin-1"), b"content-type": b"text/plain"}
        answer = httpx2.post(f"{closed.url}/jobs", content='{"prompt": "x"}', headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin"), origin
        assert "access-control-allow-origin" not in answer.headers
    answer = httpx2.post(
        f"{closed.url}/v1/completions", json={"prompt": "x"}, headers={"origin": "null"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
    preflight = httpx2.options(
        f"{closed.url}/jobs",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 403
    assert not closed.gateways[0].events("request_accepted")


def test_a_foreign_page_cannot_embed(closed: Stack) -> None:
    """Images and scripts come without an origin; browsers say that they are cross-site. A link is
    followed, and programs say nothing at all."""
    for site, mode, expected in (
        ("cross-site", "no-cors", 403),
        ("cross-site", "navigate", 200),
        ("same-origin", "no-cors", 200),
        ("none", "navigate", 200),
    ):
        headers = {"sec-fetch-site": site, "sec-fetch-mode": mode}
        assert httpx2.get(f"{closed.url}/queue", headers=headers).status_code == expected


def test_its_own_pages_and_programs_may_submit(closed: Stack) -> None:
    """The same origin, and none."""
    for headers in ({}, {"origin": closed.url}):
        assert httpx2.post(f"{closed.url}/jobs", json={"prompt": "x"}, headers=headers).is_success
    plain = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d says
    assert httpx2.post(f"{closed.url}/jobs", content='{"prompt": "x"}', headers=plain).is_success


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:1", 200),
        ("LOCALHOST.", 200),
        ("[::1]:5001", 200),
        ("10.1.2.3:5001", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.localhost", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil", 403),
        ("xn--bcher-kva.example:5001", 403),
        ("", 400),
        ("x:abc", 400),
        ("x:99999999999", 400),
        ("[::1", 400),
        ("localhost, evil.example", 400),
        ("b\u00fccher.example", 400),
        ("localhost/evil", 400),
        ("evil@localhost", 400),
    ],
)
def test_a_name_that_is_not_its_own_is_refused(closed: Stack, host: str, status: int) -> None:
    """An attacker's name may point here (DNS rebinding); an address cannot be one. On every path,
    and never a fault of the gateway."""
    for path in ("/healthz", "/nothing", "/status/x"):
        answered, body = ask(closed.url, get(closed.url, path, f"Host: {host}"))
        assert answered == (status if status != 200 or path == "/healthz" else 404), body
        if status == 403:
            assert json.loads(body)["code"] == "foreign_host"
    assert "Traceback" not in closed.gateways[0].output()


def test_one_host_header_is_needed(closed: Stack) -> None:
    """None only in HTTP/1.0, which no browser speaks."""
    for head, status in (
        (b"GET /healthz HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\n", 200),
        (b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n", 403),
        (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n", 200),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 400),
    ):
        answered, body = ask(closed.url, head + b"Connection: close\r\n\r\n")
        assert answered == status or (status == 400 and answered in (404, 405)), (head, body)
        assert answered != 500


def test_a_listed_origin_may_submit(opened: Stack) -> None:
    """Its preflight is answered, and it can read what the answers say."""
    for origin in (PAGE, "https://app.example"):
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,idempotency-key",
        }
        preflight = httpx2.options(f"{opened.url}/v1/chat/completions", headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for path, status in (("/jobs", 202), ("/nothing", 404)):
            answer = httpx2.post(
                f"{opened.url}{path}", json={"prompt": "x"}, headers={"origin": origin}
            )
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin
            assert "location" in answer.headers["access-control-expose-headers"]
    for origin in ("http://app.example", "https://app.example:444", "https://app.example.evil"):
        answer = httpx2.post(f"{opened.url}/jobs", json={"prompt": "x"}, headers={"origin": origin})
        assert answer.status_code == 403


def test_a_listed_host_may_be_named(opened: Stack) -> None:
    """With any port, and its own pages. One that comes through a proxy with TLS has another origin,
    which has to be listed."""
    for host in ("gateway:5001", "sluice.example"):
        assert ask(opened.url, get(opened.url, "/queue", f"Host: {host}"))[0] == 200
    for origin, status in (
        ("http://sluice.example", 200),
        ("http://sluice.example:80", 200),
        ("https://sluice.example", 403),
        ("http://sluice.example:8080", 403),
        ("http://gateway", 403),
    ):
        lines = ("Host: sluice.example", f"Origin: {origin}")
        assert ask(opened.url, get(opened.url, "/queue", *lines))[0] == status
