"""Which hosts are this machine, and that no HTTP client of ours asks the environment by itself."""

import ast

import httpx2
import pytest

from cli.proxy import is_this_machine, proxy_for
from tests.support.processes import ROOT

CLIENTS = {"Client", "AsyncClient", "get", "post", "put", "delete", "request", "stream"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LocalHost.", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("::", True),
        ("localhost.example", False),
        ("128.0.0.1", False),
        ("::2", False),
        ("gateway", False),
    ],
)
def test_hosts_of_this_machine_need_no_proxy(host: str, expected: bool) -> None:
    """Every spelling of loopback counts, and nothing that only resembles one."""
    assert is_this_machine(host) is expected


def test_the_environment_names_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme's own comes before all_proxy; no_proxy and loopback need none; a proxy without a
    scheme speaks HTTP, as for curl."""
    url = httpx2.URL("http://gateway.example:5001")
    assert proxy_for(url) is None
    monkeypatch.setenv("all_proxy", "socks5://other:1080")
    assert str(proxy_for(url).url) == "socks5://other:1080"  # type: ignore[union-attr]
    monkeypatch.setenv("http_proxy", "proxy:3128")
    assert str(proxy_for(url).url) == "http://proxy:3128"  # type: ignore[union-attr]
    assert proxy_for(httpx2.URL("http://127.0.0.1:5001")) is None
    monkeypatch.setenv("no_proxy", ".example")
    assert proxy_for(url) is None


def test_every_client_says_whether_it_uses_the_environments_proxy() -> None:
    """httpx2 goes through the environment's proxy by default: each call must turn that off."""
    calls = []
    for folder in ("cli", "services", "shared", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "httpx2"
                    and node.func.attr in CLIENTS
                ):
                    calls.append(file.name)
                    given = {argument.arg for argument in node.keywords}
                    assert "trust_env" in given, f"{file}:{node.lineno}"
    assert {"client.py", "stack.py", "demo.py"} <= set(calls)
