"""Checks the host name and the origin of requests.

A browser sends the requests of any page to any address, also to this machine. Two headers cannot be
forged by the page: ``Host``, the name the browser connected to, which an attacker's name server may
have pointed here (DNS rebinding); and ``Origin``, the origin of the page.
"""

import socket

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.http.error_response import ErrorResponse
from services.gateway.validation.addresses import (
    ANY,
    origin_of,
    parse_host,
    parse_origin,
)


class OriginCheck:
    """ASGI middleware that refuses requests for unknown hosts or from foreign origins."""

    def __init__(self, app: ASGIApp, hosts: list[str], origins: list[str]) -> None:
        """``hosts`` and ``origins`` were validated by the settings; ``*`` allows all."""
        self._app = app
        self._any_host = ANY in hosts
        names = ("localhost", socket.gethostname(), *hosts)
        self._hosts = {address.name for name in names if (address := parse_host(name))}
        self._any_origin = ANY in origins
        self._origins = {parse_origin(origin) for origin in origins if origin != ANY}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp | ErrorResponse = self._app
        if scope["type"] == ScopeType.HTTP:
            app = self._check(scope) or app
        await app(scope, receive, send)

    def _check(self, scope: Scope) -> ErrorResponse | None:
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if not hosts and scope["http_version"] == "1.0":
            host = None  # not a browser
        elif len(hosts) == 1 and (host := parse_host(hosts[0])):
            if not (self._any_host or host.is_ip or host.name in self._hosts):
                return ErrorResponse(
                    403,
                    "foreign_host",
                    f"{host.name} is not a known host name of this gateway; to allow it, set "
                    f"GATEWAY_ALLOWED_HOSTS={host.name}",
                )
        else:
            return ErrorResponse(
                400, "invalid_request", "send one Host header: a name, optionally with a port"
            )
        if self._any_origin:
            return None
        if not origins:
            return _EMBEDDED if _is_embedded(scope) else None
        origin = parse_origin(origins[0]) if len(origins) == 1 else None
        own = host and origin_of(scope["scheme"], host)
        if origin is not None and (origin == own or origin in self._origins):
            return None
        return ErrorResponse(
            403,
            "foreign_origin",
            f"pages of {', '.join(origins)[:200]} may not use this gateway; to allow them, list "
            "the origin in GATEWAY_ALLOWED_ORIGINS",
        )


_EMBEDDED = ErrorResponse(
    403,
    "foreign_origin",
    "pages of other sites may not embed responses of this gateway; use fetch, from an origin in "
    "GATEWAY_ALLOWED_ORIGINS",
)


def _is_embedded(scope: Scope) -> bool:
    """Whether a page of another site embeds the response, as an image, script or form. Such
    requests have no ``Origin``. Following a link does not count."""
    sites, modes = _values(scope, b"sec-fetch-site"), _values(scope, b"sec-fetch-mode")
    return sites == ["cross-site"] and modes != ["navigate"]


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]
