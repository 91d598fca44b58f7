"""How the endpoints of the service describe themselves (ADR-32)."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Self, get_args

import msgspec
from msgspec import Struct
from nats.micro.request import Request

Handler = Callable[[Request], Awaitable[Struct | None]]


class Endpoint(NamedTuple):
    """One subject of the service, as ``nats micro info`` describes it."""

    handler: Handler
    description: str
    request: Any = None
    """The type of the request; None if it needs none."""
    response: Any = None

    @property
    def metadata(self) -> dict[str, str]:
        described = {"description": self.description}
        for name, kind in (("request", self.request), ("response", self.response)):
            if kind is not None:
                described[name] = _names(kind)
        return described


class EndpointSchemas(Struct, frozen=True, omit_defaults=True):
    """The JSON Schemas of one endpoint."""

    request: dict[str, Any] | None = None
    response: dict[str, Any] | None = None

    @classmethod
    def of(cls, endpoint: Endpoint) -> Self:
        return cls(
            *(
                None if kind is None else msgspec.json.schema(kind)
                for kind in (endpoint.request, endpoint.response)
            )
        )


def _names(kind: Any) -> str:
    """The names of a type and of those that it may be."""
    return " | ".join(one.__name__ for one in get_args(kind) or (kind,))
