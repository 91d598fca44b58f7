"""Which names this gateway answers to, and which web pages may use it.

A browser sends any page's requests to any address, this machine's own included. What it says of
them cannot be forged by the page: the name it believes to talk to (``Host``), which an attacker's
name server may have pointed here (DNS rebinding), and the page's own origin (``Origin``).
"""

import socket

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from services.gateway.http.refusal import Refusal
from services.gateway.validation.addresses import (
    ANY,
    origin_of,
    parse_host,
    parse_origin,
)


class Sources:
    """An ASGI application that lets through what comes from an allowed source."""

    def __init__(self, app: ASGIApp, hosts: list[str], origins: list[str]) -> None:
        """``hosts`` and ``origins`` were checked by the settings; ``*`` allows all."""
        self._app = app
        self._any_host = ANY in hosts
        names = ("localhost", socket.gethostname(), *hosts)
        self._hosts = {address.name for name in names if (address := parse_host(name))}
        self._any_origin = ANY in origins
        self._origins = {parse_origin(origin) for origin in origins if origin != ANY}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp | Refusal = self._app
        if scope["type"] == ScopeType.HTTP:
            app = self._refusal(scope) or app
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if not hosts and scope["http_version"] == "1.0":
            host = None  # no browser: they have sent it for thirty years
        elif len(hosts) == 1 and (host := parse_host(hosts[0])):
            if not (self._any_host or host.is_ip or host.name in self._hosts):
                return Refusal(
                    403,
                    "foreign_host",
                    f"this gateway is not known as {host.name}; if it should be, set "
                    f"GATEWAY_ALLOWED_HOSTS={host.name}",
                )
        else:
            return Refusal(400, "invalid_request", "send one Host header: a name and maybe a port")
        if self._any_origin:
            return None
        if not origins:
            return _FROM_A_PAGE if _is_embedded(scope) else None
        origin = parse_origin(origins[0]) if len(origins) == 1 else None
        own = host and origin_of(scope["scheme"], host)
        if origin is not None and (origin == own or origin in self._origins):
            return None
        return Refusal(
            403,
            "foreign_origin",
            f"pages of {', '.join(origins)[:200]} may not use this gateway; if they should, list "
            "it in GATEWAY_ALLOWED_ORIGINS",
        )


_FROM_A_PAGE = Refusal(
    403,
    "foreign_origin",
    "pages of other sites may not embed what this gateway answers; use fetch, from an origin in "
    "GATEWAY_ALLOWED_ORIGINS",
)


def _is_embedded(scope: Scope) -> bool:
    """Whether a page of another site asks without saying which: as an image, a script, a form.
    Following a link is not one of these."""
    sites, modes = _values(scope, b"sec-fetch-site"), _values(scope, b"sec-fetch-mode")
    return sites == ["cross-site"] and modes != ["navigate"]


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]
