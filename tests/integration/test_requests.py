"""How requests reach the NATS service: nats.micro on top of `Requests`, on a real broker."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from typing import cast

import nats.errors
import nats.micro
import pytest
from nats.aio.client import Client
from nats.micro.request import Request
from nats.micro.service import ServiceConfig

from services.gateway.micro.requests import InFlight, Requests
from shared.broker.client import Connection
from shared.broker.connection import Broker
from shared.errors import Overloaded
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, NatsServer


@pytest.fixture
async def client(nats_server: NatsServer) -> AsyncIterator[Client]:
    # Its `flush` returns when the broker has handled what was sent before; nats-py's own may not.
    connection = Connection(lambda *_: None)
    await connection.connect(nats_server.url)
    yield connection
    await connection.close()


class Service:
    """One endpoint, ``echo``, whose requests end when the test says so."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.started = 0

    async def start(self, nc: Client) -> Requests:
        requests = Requests(nc)
        service = await nats.micro.add_service(
            cast(Client, requests), ServiceConfig(name="test", version="0.0.1")
        )
        await service.add_endpoint(name="echo", handler=self._handle)
        await requests.flush()
        return requests

    async def _handle(self, request: Request) -> None:
        self.started += 1
        if request.data == b"slow":
            await self.release.wait()
        await request.respond(request.data)


@pytest.fixture
async def served(broker: Broker) -> tuple[Service, Requests]:
    """A service on a connection of its own."""
    service = Service()
    return service, await service.start(broker.nc)


async def test_a_slow_request_does_not_delay_the_others(
    client: Client, served: tuple[Service, Requests]
) -> None:
    """One endpoint handles its requests side by side."""
    slow = asyncio.create_task(client.request("echo", b"slow", timeout=PATIENCE_S))
    quick = [client.request("echo", b"%d" % number, timeout=PATIENCE_S) for number in range(100)]
    assert [int(answer.data) for answer in await asyncio.gather(*quick)] == list(range(100))
    assert not slow.done()
    served[0].release.set()
    assert (await slow).data == b"slow"


async def test_a_request_that_cannot_be_answered_raises_nothing(
    client: Client, served: tuple[Service, Requests]
) -> None:
    """One without a reply subject, to the endpoint or to nats.micro's own PING, INFO and STATS: the
    event loop reports no exception that was never retrieved."""
    unhandled: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    for subject in ("echo", "$SRV.PING", "$SRV.INFO.test", "$SRV.STATS"):
        await client.publish(subject, b"")
    await client.request("echo", b"after them", timeout=PATIENCE_S)
    await client.request("$SRV.STATS.test", b"", timeout=PATIENCE_S)
    gc.collect()
    await asyncio.sleep(0)
    assert not unhandled


async def test_nothing_is_published_to_what_is_not_an_inbox(
    client: Client, served: tuple[Service, Requests]
) -> None:
    """Neither by the endpoint nor by nats.micro's own answers to PING, INFO and STATS."""
    target = "somewhere.else"
    received = await client.subscribe(target)
    verbs = [f"$SRV.{verb}{name}" for verb in ("PING", "INFO", "STATS") for name in ("", ".test")]
    for subject in ("echo", *verbs):
        await client.publish(subject, b"aimed", reply=target)
        answer = await client.request(subject, b"asked", timeout=PATIENCE_S)
        assert answer.data
    await flush(client)
    assert received.pending_msgs == 0
    assert served[0].started == 1


async def test_a_drain_answers_what_had_been_sent(
    client: Client, nats_server: NatsServer, served: tuple[Service, Requests]
) -> None:
    """Whatever the broker had sent when the service stops is handled; what comes later goes to
    another instance, or gets the broker's own "no responders"."""
    service, requests = served
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    for number in range(2000):
        await client.publish("echo", b"%d" % number, reply=inbox)
    await client.publish("echo", b"slow", reply=inbox)
    await flush(client)  # so all of them have been sent to the service
    draining = asyncio.create_task(requests.drain(PATIENCE_S))
    got = {(await answers.next_msg(PATIENCE_S)).data for _ in range(2000)}
    assert got == {b"%d" % number for number in range(2000)}
    async with asyncio.timeout(PATIENCE_S):
        while await _is_answered(client):
            pass
    assert not draining.done()
    service.release.set()
    assert (await answers.next_msg(PATIENCE_S)).data == b"slow"
    await draining


async def test_a_drain_that_takes_too_long_is_cut_off(
    client: Client, served: tuple[Service, Requests]
) -> None:
    """A request that never ends does not keep the process from ending."""
    service, requests = served
    await client.publish("echo", b"slow", reply=client.new_inbox())
    await client.request("echo", b"quick", timeout=PATIENCE_S)
    assert service.started == 2
    async with asyncio.timeout(PATIENCE_S):
        await requests.drain(0.2)
        await requests.drain(0.2)  # also when it is called again, on what is drained


async def test_a_service_is_listed_as_any_other(
    client: Client, served: tuple[Service, Requests]
) -> None:
    """ADR-32: what `nats micro` shows is still there, and counts what is handled side by side."""
    await asyncio.gather(*(client.request("echo", b"x", timeout=PATIENCE_S) for _ in range(50)))
    stats = json.loads((await client.request("$SRV.STATS.test", timeout=PATIENCE_S)).data)
    assert (stats["endpoints"][0]["num_requests"], stats["endpoints"][0]["num_errors"]) == (50, 0)


def test_requests_in_flight_are_bounded() -> None:
    """By number and by size; a single one is taken whatever its size."""
    in_flight = InFlight(most=2, most_bytes=100)
    with in_flight.admitted(1000), pytest.raises(Overloaded), in_flight.admitted(1):
        pass
    with (
        in_flight.admitted(40),
        in_flight.admitted(40),
        pytest.raises(Overloaded, match="2 such requests of 80 bytes"),
        in_flight.admitted(0),
    ):
        pass
    with in_flight.admitted(1000):
        pass


async def _is_answered(client: Client) -> bool:
    try:
        await client.request("echo", b"late", timeout=PATIENCE_S)
    except nats.errors.NoRespondersError:
        return False
    return True
