"""The gateway as a process: serve HTTP and NATS until SIGTERM."""

import asyncio
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from services.gateway.gateway import Gateway
from services.gateway.http.app import create_app
from services.gateway.http.connection_limit import (
    ConnectionLimit,
    connection_bound,
    raise_descriptor_limit,
)
from services.gateway.http.protocol import BoundedProtocol
from services.gateway.jobs.retries import Retries
from services.gateway.micro.service import NatsService
from services.gateway.settings import GatewaySettings
from shared.background import first_of
from shared.config import BrokerSettings, load
from shared.errors import SettingsError
from shared.logs import configure_logs, logger
from shared.process.lifecycle import stop_on_signals


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours end the streams before the connections."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                assert isinstance(connection, BoundedProtocol)
                connection.check_timeouts(now)
        return await super().on_tick(counter)


async def main() -> None:
    settings = load(GatewaySettings, "GATEWAY")
    gateway = Gateway(settings, load(BrokerSettings, "NATS"))
    gateway.edge = NatsService(
        gateway.broker,
        gateway.fleet,
        gateway.jobs,
        gateway.results,
        gateway.idempotency,
        Retries(gateway.broker),
        gateway.job_list,
    )
    configure_logs("gateway")
    log = logger()
    connections = ConnectionLimit(
        connection_bound(settings.max_connections, raise_descriptor_limit())
    )
    with stop_on_signals() as stopping, _listen(settings) as listening:
        host, port = listening.getsockname()[:2]
        log.info("gateway_listening", host=host, port=port, max_connections=connections.limit)
        config = uvicorn.Config(
            create_app(gateway, on_fatal=stopping.set),
            http=partial(BoundedProtocol, settings, connections),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            log_level="error",  # not what clients send wrongly
            access_log=False,
            lifespan="on",
            timeout_keep_alive=math.ceil(settings.keep_alive_s),
            timeout_graceful_shutdown=int(settings.shutdown_s),
            server_header=False,
            proxy_headers=False,
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="serve HTTP")
        await first_of(serving, stopping)
        gateway.stop()
        log.info("gateway_stopping")
        server.should_exit = True
        await serving
    if gateway.fatal is not None:
        raise gateway.fatal
    log.info("gateway_stopped")


def _listen(settings: GatewaySettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"GATEWAY_HOST={settings.host}, GATEWAY_PORT={settings.port}: cannot listen there: "
            f"{error.strerror or error}"
        ) from None
