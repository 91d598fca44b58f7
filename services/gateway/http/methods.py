"""The allowed methods of a path, for the header ``Allow`` (RFC 9110)."""

from pathlib import Path

from litestar.routes import HTTPRoute
from litestar.types import Scope


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


def _matches(route: HTTPRoute, parts: list[str]) -> bool:
    for number, component in enumerate(route.path_components):
        if not isinstance(component, str) and component.type is Path:
            return len(parts) > number  # a path parameter matches the rest
        if number >= len(parts) or (isinstance(component, str) and component != parts[number]):
            return False
    return len(parts) == len(route.path_components)
