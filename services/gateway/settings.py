"""``GATEWAY_*``: how one gateway runs."""

from typing import Annotated

import msgspec
from msgspec import Meta

from services.gateway.validation.addresses import ANY, parse_host, parse_origin
from shared.config import Port, Positive, Seconds
from shared.model_names import NAME_RULE, is_name
from shared.retention import MAX_JOB_LIFETIME


class GatewaySettings(msgspec.Struct, frozen=True):
    """Every field is an environment variable, ``GATEWAY_PORT`` for ``port`` and so on."""

    host: str = "127.0.0.1"
    port: Port = 5001
    models: str = ""
    """Names, separated by commas, of models that exist before their first inferer has started."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Copies of every stream: 1 on a single server, 3 or 5 on a cluster."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 4 * 1024 * 1024
    """The largest request body; it must fit into one message of the broker."""
    default_timeout_s: Seconds = MAX_JOB_LIFETIME.total_seconds()
    """The deadline of a job that names none, counted from its acceptance."""
    max_waiting: Positive = 10_000
    """How many jobs may wait for one model; more are refused with 429 until there is room."""
    publish_patience_s: Seconds | None = None
    """How long a submit waits for a broker that does not confirm, before 503; see `patience_s`."""
    shutdown_s: Seconds = 5.0
    """How long open connections get to end after SIGTERM."""
    allowed_hosts: str = ""
    """Names, separated by commas, by which clients may call this gateway, besides ``localhost``,
    this machine's name and addresses; ``*`` for any."""
    allowed_origins: str = ""
    """Origins, ``https://app.example.com``, whose web pages may use this gateway; ``*`` for any."""
    max_connections: Positive = 10_000
    """Over HTTP; fewer where the process may not open so many files."""
    max_streams: Positive = 1000
    """How many event streams may be open; more are refused with 503."""
    keep_alive_s: Seconds = 75.0
    """How long a connection may be idle; longer than what proxies keep one (60 s)."""
    head_timeout_s: Seconds = 20.0
    """How long the head of a request may take, from its first byte or from the connection."""
    body_timeout_s: Seconds = 20.0
    """How long a body may take; longer while it comes at 500 bytes a second."""
    send_timeout_s: Seconds = 30.0
    """How long a client may leave a full connection unread."""

    def __post_init__(self) -> None:
        for host in self.host_names:
            if host != ANY and ((address := parse_host(host)) is None or address.port):
                raise ValueError(f"{host!r} is not the name of a host; give it without a port")
        for origin in self.origins:
            if origin != ANY and parse_origin(origin) is None:
                raise ValueError(
                    f"{origin!r} is not an origin; give https://name or http://name:port"
                )
        for name in self.model_names:
            if not is_name(name):
                raise ValueError(f"{name!r} is not a valid model name: give {NAME_RULE}")

    @property
    def patience_s(self) -> float:
        """The configured value; by default, on a cluster, longer than an election."""
        if self.publish_patience_s is not None:
            return self.publish_patience_s
        return 4.0 if self.replicas == 1 else 20.0

    @property
    def model_names(self) -> list[str]:
        return _listed(self.models)

    @property
    def host_names(self) -> list[str]:
        return _listed(self.allowed_hosts)

    @property
    def origins(self) -> list[str]:
        return _listed(self.allowed_origins)


def _listed(text: str) -> list[str]:
    """The names between the commas, without duplicates."""
    names = (name.strip() for name in text.split(","))
    return list(dict.fromkeys(name for name in names if name))
