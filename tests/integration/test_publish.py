"""Publishing to a real broker: what it would not take is refused before it hangs up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import StreamConfig

from shared.broker.connection import Broker, Stored, connected
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable, RequestTooLarge, StorageShort
from shared.wire import subjects
from tests.support.nats_client import flush
from tests.support.processes import PATIENCE_S, NatsServer


async def test_headers_count_towards_the_largest_message(broker: Broker) -> None:
    """To the byte: the largest message is stored, one that is larger by one is refused, and the
    connection stays in both cases."""
    await broker.js.add_stream(StreamConfig(name="S", subjects=["s"]))
    headers = {subjects.HEADER_REPLY_TO: "_INBOX." + "ü" * 1000}
    block = len(b"NATS/1.0\r\nReply-To: \r\n\r\n") + len(headers["Reply-To"].encode())
    payload = bytes(broker.nc.max_payload - block)
    with pytest.raises(RequestTooLarge):
        await broker.publish_stored("s", payload + b"x", headers, patience_s=5)
    assert (await broker.publish_stored("s", payload, headers, patience_s=5)).seq == 1
    await flush(broker.nc)
    assert broker.nc.stats["reconnects"] == 0
    assert (await broker.js.stream_info("S")).state.messages == 1


@asynccontextmanager
async def full_store(folder: Path) -> AsyncIterator[tuple[Broker, NatsServer]]:
    """A connection to a broker of 1 MB that has no room for 100,000 bytes more, all in ``s.2``."""
    configuration = folder / "nats.conf"
    configuration.write_text("jetstream { max_file_store: 1MB }")
    with NatsServer(folder / "nats", configuration) as server:
        async with connected(BrokerSettings(url=server.url), "test") as broker:
            await broker.js.add_stream(StreamConfig(name="S", subjects=["s.*"]))
            await broker.publish_stored("s.1", b"x", {subjects.HEADER_MSG_ID: "1"}, 5)
            large = [broker.publish_stored("s.2", bytes(100_000), {}, 5) for _ in range(20)]
            outcomes = await asyncio.gather(*large, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {Stored, StorageShort}
            yield broker, server


async def test_a_full_store_is_an_error_of_its_own(tmp_path: Path) -> None:
    """Of the server, whose limit nobody can ask for: it is said at once, and passes with room. A
    message that was stored before is still known when it is sent again."""
    async with full_store(tmp_path) as (broker, _):
        assert (await broker.js.account_info()).limits.max_storage == -1
        again = await broker.publish_stored("s.1", b"x", {subjects.HEADER_MSG_ID: "1"}, 5)
        assert (again.seq, again.duplicate) == (1, True)
        await broker.js.purge_stream("S")
        await broker.publish_stored("s.2", bytes(100_000), {}, patience_s=5)


async def test_a_full_store_after_an_unconfirmed_try_says_it_may_have_landed(
    tmp_path: Path,
) -> None:
    """The first one may have landed: it is not said that nothing was stored."""
    async with full_store(tmp_path) as (broker, _):
        publishing = asyncio.create_task(broker.publish_stored("t", bytes(100_000), {}, 3))
        await asyncio.sleep(0)  # it is sent, and finds no stream
        await broker.js.add_stream(StreamConfig(name="T", subjects=["t"]))
        with pytest.raises(BrokerUnavailable) as caught:
            await publishing
    assert caught.type is BrokerUnavailable
    assert "resource" in caught.value.message or "storage" in caught.value.message


async def test_a_full_store_after_an_unsent_try_says_nothing_was_stored(tmp_path: Path) -> None:
    """The connection was down: the first that was sent is the first that could have landed."""
    async with full_store(tmp_path) as (broker, server):
        lost = asyncio.Event()
        broker.nc._disconnected_cb = _setting(lost)
        server.process.kill()
        await asyncio.wait_for(lost.wait(), PATIENCE_S)
        publishing = asyncio.create_task(broker.publish_stored("s.3", bytes(100_000), {}, 600))
        await asyncio.sleep(0)  # it has nothing to send it over
        server.start()
        with pytest.raises(StorageShort):
            await publishing


def _setting(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def set_it() -> None:
        event.set()

    return set_it
