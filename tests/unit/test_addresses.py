"""Hosts and origins in one spelling, or not at all."""

import pytest

from services.gateway.validation.addresses import Address, parse_host, parse_origin


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("localhost", "localhost", None),
        ("LocalHost.:5001", "localhost", 5001),
        ("127.0.0.1:5001", "127.0.0.1", 5001),
        ("[::1]:80", "::1", 80),
        ("[0:0:0:0:0:0:0:1]", "::1", None),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", None),
        ("my_service", "my_service", None),
        ("name:", "name", None),
    ],
)
def test_a_host_has_one_spelling(text: str, name: str, port: int | None) -> None:
    """Case, a final dot and zeros in an address make no difference."""
    assert parse_host(text) == Address(name, port)


NO_HOSTS = (
    *("", ".", ":80", "x:abc", "x:99999", "x:" + "9" * 5000, "x:80:90", "x:-1", "x:\u0661"),
    *("[::1", "[]", "[::g]", "::1", "a b", "a,b", "user@x", "x/y", "x?y", "x#y", "x\t"),
    "b\u00fccher.example",
)

NO_ORIGINS = (
    *("null", "", "localhost", "//x", "http://", "http:x", "http://x/", "http://x/y", "http://x:y"),
    *("http://u@x", "http://x http://y", "http://x?", "http://[::1", "file://", "://x"),
)


@pytest.mark.parametrize("text", NO_HOSTS)
def test_what_is_not_a_host_is_nothing(text: str) -> None:
    """Never an exception."""
    assert parse_host(text) is None


def test_an_origin_has_one_spelling() -> None:
    """The port of its scheme may be said or not."""
    assert parse_origin("HTTPS://App.Example:443") == parse_origin("https://app.example")
    assert parse_origin("http://app.example:443") != parse_origin("https://app.example")
    assert parse_origin("http://localhost:3000") != parse_origin("http://localhost:3001")
    assert parse_origin("chrome-extension://abcdef") is not None


@pytest.mark.parametrize("text", NO_ORIGINS)
def test_what_is_not_an_origin_is_nothing(text: str) -> None:
    """``null`` is what a sandboxed page or a file says; it is nobody's origin."""
    assert parse_origin(text) is None
