"""What would end nats-py's client for good leads to a new connection, subscriptions and all."""

import asyncio
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from nats import errors
from nats.aio.msg import Msg

from shared.broker import connection
from shared.broker.connection import Broker, connected
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from tests.support.nats_client import flush
from tests.support.processes import NatsServer

PATIENCE_S = 30.0


class Listener:
    """A subscription, and what it received."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.received: list[Msg] = []

    async def start(self, subject: str) -> None:
        await self.broker.nc.subscribe(subject, cb=self._receive)
        await flush(self.broker.nc)

    async def receives(self, publish: Callable[[str], Awaitable[None]], subject: str) -> None:
        """Until a message that ``publish`` sends arrives; what is sent meanwhile may be lost."""
        before = len(self.received)
        async with asyncio.timeout(PATIENCE_S):
            while len(self.received) == before:
                await publish(subject)
                await asyncio.sleep(0.05)

    async def _receive(self, message: Msg) -> None:
        self.received.append(message)


@asynccontextmanager
async def raw(server: NatsServer) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """Sends bytes to the broker as they are, once it has read all that came before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')

    async def send(line: bytes) -> None:
        writer.write(line + b"PING\r\n")
        async with asyncio.timeout(PATIENCE_S):
            while (answer := await reader.readline()) != b"PONG\r\n":
                assert answer, "the broker has hung up"
                assert not answer.startswith(b"-ERR"), answer

    yield send
    writer.close()


MALFORMED = {
    "a header block of one byte": b"HPUB s.x %s 1 1\r\nX\r\n",
    "a header block without an end": b"HPUB s.x %s 10 10\r\nNATS/1.0AB\r\n",
    "a status that is not UTF-8": b"HPUB s.x %s 16 16\r\nNATS/1.0 \xff\xfe\xfd\r\n\r\n\r\n",
    "a description that is not UTF-8": b"HPUB s.x %s 18 18\r\nNATS/1.0 503 \xff\r\n\r\n\r\n",
    "a reply that is not UTF-8": b"PUB s.x _INBOX.\xff.\xfe 1\r\nX\r\n",
    "a subject that is not UTF-8": b"PUB s.\xff\xfe %s 1\r\nX\r\n",
    "a subject with a vertical tab": b"PUB s.a\x0bb %s 1\r\nX\r\n",
    "a subject with a form feed and a number": b"PUB s.a\x0c1 %s 1\r\nX\r\n",
}


@pytest.mark.parametrize("kind", MALFORMED)
async def test_a_malformed_message_costs_nothing_but_itself(
    nats_server: NatsServer, broker: Broker, kind: str
) -> None:
    """The next one arrives on the same connection, and no other subscription gets the bad one."""
    listener, other = Listener(broker), Listener(broker)
    await other.start("other")
    await listener.start("s.*")
    async with raw(nats_server) as send:
        line = MALFORMED[kind]
        await send(line % b"_INBOX.a.b" if b"%s" in line else line)
        await send(b"PUB s.good 2\r\nok\r\n")
        async with asyncio.timeout(PATIENCE_S):
            while not any(message.data == b"ok" for message in listener.received):
                await asyncio.sleep(0.01)
    assert broker.nc.stats["reconnects"] == 0
    assert not other.received
    assert all(message.headers is None for message in listener.received)


async def test_a_task_that_ended_is_replaced(broker: Broker, nats_server: NatsServer) -> None:
    """Whichever of the client's tasks ends, for whatever reason: the subscription works again."""
    listener = Listener(broker)
    await listener.start("s")
    async with connected(BrokerSettings(url=nats_server.url), "other") as other:
        for name in ("_reading_task", "_flusher_task", "_ping_interval_task"):
            getattr(broker.nc, name).cancel()
            await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE_S):
                while broker.nc.is_connected and getattr(broker.nc, name).done():
                    await asyncio.sleep(0.01)
            await listener.receives(other.nc.publish, "s")
            await flush(broker.nc)
        await broker.nc.force_reconnect()
        reconnecting = broker.nc._reconnection_task
        assert reconnecting is not None
        reconnecting.cancel()
        await listener.receives(other.nc.publish, "s")
        await flush(broker.nc)


async def test_a_flush_comes_after_what_was_sent_before(broker: Broker) -> None:
    """What the broker says to the last message has arrived with it: here, that nobody gets it."""
    answers = await broker.nc.subscribe("answers")
    for number in range(500):
        await broker.nc.publish("nobody.is.here", reply="answers")
        await flush(broker.nc)
        assert answers.pending_msgs == number + 1


async def test_a_flush_outlasts_its_connection(nats_server: NatsServer, broker: Broker) -> None:
    """The broker dies with the ping unanswered; the flush ends with the next connection, on which
    the broker knows the subscriptions."""
    received = await broker.nc.subscribe("s")
    nats_server.process.freeze()
    flushing = asyncio.create_task(broker.nc.flush(PATIENCE_S))
    await asyncio.sleep(0.1)
    assert not flushing.done()
    nats_server.process.kill()
    await asyncio.to_thread(nats_server.start)
    await flushing
    async with raw(nats_server) as send:
        await send(b"PUB s 1\r\nX\r\n")
    await broker.nc.flush()
    assert received.pending_msgs == 1


async def test_a_flush_that_is_given_up_costs_no_connection(
    nats_server: NatsServer, broker: Broker
) -> None:
    """Its ping is answered later, when nobody waits for it; nor does a later flush take that for
    its own answer."""
    nats_server.process.freeze()
    with pytest.raises(errors.FlushTimeoutError):
        await broker.nc.flush(0.1)
    given_up = asyncio.create_task(broker.nc.flush())
    await asyncio.sleep(0.1)
    given_up.cancel()
    nats_server.process.thaw()
    answers = await broker.nc.subscribe("answers")
    for number in range(10):
        await broker.nc.publish("nobody.is.here", reply="answers")
        await broker.nc.flush()
        assert answers.pending_msgs == number + 1
    assert broker.nc.stats["reconnects"] == 0


async def test_a_flush_ends_with_its_client(nats_server: NatsServer) -> None:
    async with connected(BrokerSettings(url=nats_server.url), "test") as broker:
        nats_server.process.freeze()
        flushing = asyncio.create_task(broker.nc.flush(PATIENCE_S))
        await asyncio.sleep(0.1)
    with pytest.raises(errors.ConnectionClosedError):
        await flushing


async def test_what_is_held_back_is_lost_with_its_connection(
    nats_server: NatsServer, broker: Broker
) -> None:
    """A pull or nak must not come late. What is published during the outage is sent after it."""
    reconnected = asyncio.Event()
    broker.on_reconnect(reconnected.set)
    async with connected(BrokerSettings(url=nats_server.url), "other") as other:
        listener = Listener(other)
        await listener.start("s.*")
        await broker.nc.publish("s.before")
        await broker.nc.force_reconnect()
        await asyncio.sleep(0)
        await broker.nc.publish("s.during")
        async with asyncio.timeout(PATIENCE_S):
            await reconnected.wait()
        await broker.nc.publish("s.after")
        await flush(broker.nc)
        await flush(other.nc)
    assert [message.subject for message in listener.received] == ["s.during", "s.after"]


async def test_a_read_that_fails_or_breaks_off_is_no_result(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a part would be taken for the whole. Nor is an inbox left open, here or by a request."""
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.1)

    async def answer_once(query: Msg) -> None:
        headers = {"Nats-Subject": "s", "Nats-Sequence": "1", "Nats-Time-Stamp": "now"}
        await broker.nc.publish(query.reply, headers=headers)

    await broker.nc.subscribe("$JS.API.DIRECT.GET.BROKEN_OFF", cb=answer_once)
    for stream in ("BROKEN_OFF", "MISSING"):
        with pytest.raises(BrokerUnavailable):
            await broker.direct_get_all(stream, multi_last=["s"])
    with pytest.raises(errors.NoRespondersError):
        await broker.nc.request("nobody.is.here")
    assert not broker.nc._inboxes


async def test_only_its_owner_closes_it(broker: Broker, nats_server: NatsServer) -> None:
    """nats-py's own way to close for good, from within, leads to a new connection."""
    listener = Listener(broker)
    await listener.start("s")
    await broker.nc._close(broker.nc.CLOSED)
    async with connected(BrokerSettings(url=nats_server.url), "other") as other:
        await listener.receives(other.nc.publish, "s")
    await broker.close()
    assert broker.nc.is_closed


CONFIGURATIONS = {
    "its user is gone": "authorization { users: [{user: them, password: secret}] }",
    "its password is another": "authorization { users: [{user: us, password: another}] }",
    "it takes no connections": "max_connections: 0",
}


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
async def test_a_configuration_with_a_mistake_does_not_close_the_client(
    tmp_path: Path, mistake: str
) -> None:
    """The broker reloads it and puts everybody out; a second later it is mended, and the client
    receives and publishes as before."""
    configuration = tmp_path / "nats.conf"
    good = "authorization { users: [{user: us, password: secret}, {user: them, password: x}] }"
    configuration.write_text(good)
    with NatsServer(tmp_path / "nats", configuration) as server:
        url = f"nats://us:secret@127.0.0.1:{server.port}"
        async with connected(BrokerSettings(url=url), "test") as broker:
            listener = Listener(broker)
            await listener.start("s")
            configuration.write_text(CONFIGURATIONS[mistake])
            server.process.popen.send_signal(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_S):
                while broker.is_connected:
                    await asyncio.sleep(0.01)
            configuration.write_text(good)
            server.process.popen.send_signal(signal.SIGHUP)
            await listener.receives(broker.nc.publish, "s")
            await flush(broker.nc)


async def test_a_publish_that_the_broker_would_hang_up_for_is_refused(broker: Broker) -> None:
    """A subject that is too long and a message that is too large are refused here: the connection
    stays."""
    listener = Listener(broker)
    await listener.start("s")
    for subject, headers in (("x" * 5000, None), ("s", {"Name": "x" * broker.nc.max_payload})):
        with pytest.raises(Exception, match="nats"):
            await broker.nc.publish(subject, b"x", headers=headers)
    await flush(broker.nc)
    assert broker.nc.stats["reconnects"] == 0
    await listener.receives(broker.nc.publish, "s")


def test_a_reset_in_the_handshake_is_survived(nats_server: NatsServer) -> None:
    """Under uvloop, as the services run: of the connections that are made through a door which
    resets every one but the first and the last in the middle of its handshake."""

    async def run() -> None:
        door = Door(nats_server.port)
        async with door.open() as url, connected(BrokerSettings(url=url), "test") as broker:
            listener = Listener(broker)
            await listener.start("s")
            for bytes_before in (0, 10, 10_000, None):
                door.reset_after = bytes_before
                door.hang_up()
                if bytes_before is not None:
                    async with asyncio.timeout(PATIENCE_S):
                        seen = door.resets
                        while door.resets < seen + 5:
                            await asyncio.sleep(0.01)
            await listener.receives(broker.nc.publish, "s")

    uvloop.run(run())


def test_a_peer_that_stops_reading_is_left_for_a_new_connection(nats_server: NatsServer) -> None:
    """What is still to be sent to it does not keep the client from another connection."""

    async def run() -> None:
        door = Door(nats_server.port)
        async with door.open() as url, connected(BrokerSettings(url=url), "test") as broker:
            listener = Listener(broker)
            await listener.start("s")
            door.freeze()
            for _ in range(20):
                await broker.nc.publish("t", bytes(1024 * 1024))
            await listener.receives(broker.nc.publish, "s")
            assert broker.nc.stats["reconnects"] == 1

    uvloop.run(run())


class Door:
    """A way to the broker that can be shut in the middle of a sentence."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[asyncio.StreamWriter] = []
        self.reset_after: int | None = None
        """Bytes of the broker's greeting that pass before the reset; None lets everything pass."""
        self.resets = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        yield f"nats://127.0.0.1:{port}"
        self.hang_up()
        server.close()

    def freeze(self) -> None:
        """Read nothing more from those who are connected."""
        for writer in self._open:
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it reads as well

    def hang_up(self) -> None:
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._open += [writer, back]
        if self.reset_after is not None:
            writer.write((await there.readline())[: self.reset_after])
            linger = struct.pack("ii", 1, 0)  # nothing more is sent but the reset
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.resets += 1
            self.hang_up()
            return
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
