"""``GATEWAY_*``: how one gateway runs."""

from datetime import timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from services.gateway.validation.addresses import ANY, is_loopback, parse_host, parse_origin
from shared.config import Port, Positive, Seconds
from shared.model_names import NAME_RULE, is_name
from shared.retention import MAX_JOB_LIFETIME, RESULT_RETENTION


class GatewaySettings(msgspec.Struct, frozen=True):
    """Every field is an environment variable, ``GATEWAY_PORT`` for ``port`` and so on."""

    host: str = "127.0.0.1"
    """The address that HTTP listens on."""
    port: Port = 5001
    """The port that HTTP listens on; 0 for any free one."""
    models: str = ""
    """Models, separated by commas, that accept jobs before their first inferer has started. If
    there is only one, it is also the default while no inferer is live; if there are several, a
    request has to name its model."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Copies of each stream: 1 on a single server, 3 or 5 on a cluster."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 4 * 1024 * 1024
    """The largest request body; larger ones get 413. It must fit into one message of the
    broker."""
    default_timeout_s: Seconds = MAX_JOB_LIFETIME.total_seconds()
    """The `timeout_s` of jobs that do not set it."""
    return_s: Seconds = 60.0
    """How many seconds a job is kept for the retry of a client that reached its timeout."""
    max_waiting: Positive = 10_000
    """Jobs that may wait for one model; more get 429."""
    publish_patience_s: Seconds | None = None
    """Seconds that a submit waits for a broker that does not confirm, for instance while it
    elects a leader, before it gets 503. By default 4, and 20 on a cluster."""
    keep_requests_h: Annotated[int, Meta(ge=0, le=168)] | None = None
    """Hours for which the requests of jobs that have ended are kept; 0 keeps none. By default 48 if
    `GATEWAY_HOST` is a loopback address, and otherwise 0."""
    list_jobs: bool | None = None
    """Whether everybody who can connect can list jobs and dead letters, and cancel, retry or drop
    them by filter: `true` or `false` (403, `listing_refused`). By default only if `GATEWAY_HOST` is
    a loopback address: a list contains the ids of all jobs, and an id is enough to read or cancel
    one."""
    history_jobs: Positive = 100_000
    """Jobs that have ended and are listed; the oldest are forgotten first. A job takes about 630
    bytes of memory, and its metadata."""
    shutdown_s: Seconds = 5.0
    """Seconds that requests may take to finish after SIGTERM."""
    allowed_hosts: str = ""
    """Host names, separated by commas, that clients may use besides `localhost`, the machine's
    own name and IP addresses; others get 403 (`foreign_host`), which stops DNS rebinding. `*`
    for any."""
    allowed_origins: str = ""
    """Origins (`https://app.example.com`), separated by commas, whose web pages may use the
    gateway; others get 403 (`foreign_origin`). `*` for any."""
    max_connections: Positive = 10_000
    """HTTP connections, fewer if the limit of open files is lower. A new one replaces the one
    that is idle for longest; if none is idle, it gets 503, except for health checks."""
    max_streams: Positive = 1000
    """Event streams open at once; more get 503."""
    keep_alive_s: Seconds = 75.0
    """Seconds that a connection may be idle. Set it higher than the idle time of your proxy or
    client pool, which is often 60."""
    head_timeout_s: Seconds = 20.0
    """Seconds that the head of a request may take to arrive, from its first byte or from the
    connection (408)."""
    body_timeout_s: Seconds = 20.0
    """Seconds that a body may take to arrive (408); longer while it arrives at 500 bytes/s."""
    send_timeout_s: Seconds = 30.0
    """Seconds that a client may leave a full connection unread before it is closed."""

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
    def kept_requests_h(self) -> int:
        """The configured value; by default as long as results, but only if no other machine can
        connect to this gateway: whoever can may read them."""
        if self.keep_requests_h is not None:
            return self.keep_requests_h
        return RESULT_RETENTION // timedelta(hours=1) if is_loopback(self.host) else 0

    @property
    def lists_jobs(self) -> bool:
        """The configured value; by default only if no other machine can connect."""
        return is_loopback(self.host) if self.list_jobs is None else self.list_jobs

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
