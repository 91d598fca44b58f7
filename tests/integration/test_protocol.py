"""The HTTP protocol on a real server, with uvloop as in the gateway."""

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
import uvloop

from services.gateway.http.connection_limit import ConnectionLimit
from services.gateway.http.protocol import BoundedProtocol
from services.gateway.server import Server
from services.gateway.settings import GatewaySettings
from tests.support.processes import PATIENCE_S


@pytest.mark.parametrize("requests", [1, 2], ids=["one request", "two in a row"])
def test_an_answer_on_a_closed_connection_raises_nothing(
    caplog: pytest.LogCaptureFixture, requests: int
) -> None:
    """It is dropped, and nothing is logged as a fault of ours."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(_answer_too_late(requests)) == "disconnect"
    assert not caplog.records


async def _answer_too_late(requests: int) -> str:
    """How an application fares that answers the first of these requests when its connection is
    closed."""
    connections: list[BoundedProtocol] = []
    outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def accept(**server: Any) -> BoundedProtocol:
        connections.append(BoundedProtocol(GatewaySettings(), ConnectionLimit(10), **server))
        return connections[-1]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        connections[-1].evict()
        event = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})
        outcome.set_result(event["type"].removeprefix("http."))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            answer,
            http=accept,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
        assert await reader.read() == b""
        async with asyncio.timeout(PATIENCE_S):
            answered = await outcome
        writer.close()
        server.should_exit = True
        await serving
    return answered
