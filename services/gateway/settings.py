"""``GATEWAY_*``: how one gateway runs."""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.config import Port, Positive, Seconds
from shared.job_ids import LONGEST_JOB
from shared.subjects import is_model_name


class GatewaySettings(msgspec.Struct, frozen=True):
    """Every field is an environment variable, ``GATEWAY_PORT`` for ``port`` and so on."""

    host: str = "127.0.0.1"
    port: Port = 5001
    models: str = ""
    """Aliases, with commas between, that exist before their first inferer has come."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Copies of every stream: 1 on a single server, 3 or 5 on a cluster."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 4 * 1024 * 1024
    """The largest request body; it must fit into one message of the broker."""
    default_timeout_s: Seconds = LONGEST_JOB.total_seconds()
    """The deadline of a job that names none, counted from its acceptance."""
    max_waiting: Positive = 10_000
    """How many jobs may wait for one model; more are refused with 429 until there is room."""
    publish_patience_s: Seconds | None = None
    """How long a submit waits out an unwilling broker before it answers 503; see `patience_s`."""
    shutdown_s: Seconds = 5.0
    """How long open connections get to end after SIGTERM."""

    def __post_init__(self) -> None:
        for name in self.model_names:
            if not is_model_name(name):
                raise ValueError(f"{name!r} is no name of a model: use a-z, 0-9, _ and -")

    @property
    def patience_s(self) -> float:
        """What was set for it, else longer than an election where there can be one."""
        if self.publish_patience_s is not None:
            return self.publish_patience_s
        return 4.0 if self.replicas == 1 else 20.0

    @property
    def model_names(self) -> list[str]:
        names = (name.strip() for name in self.models.split(","))
        return list(dict.fromkeys(name for name in names if name))
