"""The methods of a path, for the header ``Allow`` (RFC 9110)."""

from pathlib import Path

from litestar.routes import HTTPRoute
from litestar.types import Scope


def allowed_methods(scope: Scope) -> str:
    """Those that some route has for the path of this request, with commas between. The framework
    does not say it with a 405, and forgets some in the answer to OPTIONS."""
    parts = [part for part in scope["path"].split("/") if part]
    methods: set[str] = set()
    for route in scope["litestar_app"].routes:
        if isinstance(route, HTTPRoute) and _leads_to(route, parts):
            methods |= {str(method) for method in route.methods}
    return ", ".join(sorted(methods))


def _leads_to(route: HTTPRoute, parts: list[str]) -> bool:
    for number, component in enumerate(route.path_components):
        if not isinstance(component, str) and component.type is Path:
            return len(parts) > number  # it takes all that is left
        if number >= len(parts) or (isinstance(component, str) and component != parts[number]):
            return False
    return len(parts) == len(route.path_components)
