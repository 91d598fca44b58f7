"""``python -m services.gateway``: serve HTTP and NATS until SIGTERM."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from services.gateway.app import create_app
from services.gateway.gateway import Gateway
from services.gateway.settings import GatewaySettings
from shared.config import BrokerSettings, load
from shared.errors import SettingsError
from shared.lifecycle import run_process, stop_on_signals
from shared.logs import configure_logs, logger


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours end the streams before the connections."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def main() -> None:
    settings = load(GatewaySettings, "GATEWAY")
    gateway = Gateway(settings, load(BrokerSettings, "NATS"))
    configure_logs("gateway")
    log = logger()
    with stop_on_signals() as stopping, _listen(settings) as listening:
        host, port = listening.getsockname()[:2]
        log.info("gateway_listening", host=host, port=port)
        config = uvicorn.Config(
            create_app(gateway, on_fatal=stopping.set),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=int(settings.shutdown_s),
            server_header=False,
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        gateway.stopping.set()
        log.info("gateway_stopping")
        server.should_exit = True
        await serving
        stopped.cancel()
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


if __name__ == "__main__":
    sys.exit(run_process("gateway", main))
