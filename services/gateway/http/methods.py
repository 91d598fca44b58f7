"""Requests for a path or a method that does not exist: the allowed methods, for the header
``Allow`` (RFC 9110), and what may have been meant."""

from difflib import get_close_matches
from pathlib import Path

from litestar.routes import HTTPRoute
from litestar.types import HTTPScope, Scope

from services.gateway.http.openai.not_offered import why_not_offered
from services.gateway.validation.wording import CLOSE, MAX_QUOTE_CHARS


def allowed_methods(scope: Scope) -> str:
    """The methods of all routes that match the path of this request, separated by commas. The
    framework leaves them out of a 405, and leaves some out of the response to OPTIONS."""
    parts = [part for part in scope["path"].split("/") if part]
    routes = scope["litestar_app"].routes
    found = [route for route in routes if isinstance(route, HTTPRoute) and _matches(route, parts)]
    # A route without parameters takes precedence: `/jobs/cancel` is not a job.
    exact = [route for route in found if not route.path_parameters]
    methods = {str(method) for route in exact or found for method in route.methods}
    return ", ".join(sorted(methods))


def path_error(scope: HTTPScope, allowed: str = "") -> str:
    """Why this request has no route, and what to use instead: its path does not exist, or only has
    the ``allowed`` methods."""
    method, path = scope["method"], scope["path"][:MAX_QUOTE_CHARS]
    if (why := why_not_offered(scope["path"])) is not None:
        return f"{method} {path} is not offered: {why}"
    if allowed:
        return f"{method} is not possible for {path}; use {allowed}"
    known = [route.path for route in scope["litestar_app"].routes]
    nearest = get_close_matches(path, known, 1, CLOSE)
    hint = f"did you mean {nearest[0]}?" if nearest else "GET /schema lists all routes"
    return f"there is no {path}; {hint}"


def _matches(route: HTTPRoute, parts: list[str]) -> bool:
    for number, component in enumerate(route.path_components):
        if not isinstance(component, str) and component.type is Path:
            return len(parts) > number  # a path parameter matches the rest
        if number >= len(parts) or (isinstance(component, str) and component != parts[number]):
            return False
    return len(parts) == len(route.path_components)
