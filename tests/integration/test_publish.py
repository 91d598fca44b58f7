"""Publishing to a real broker: what it would not take is refused before it hangs up."""

import asyncio
from pathlib import Path

import pytest
from nats.js.api import PubAck, StreamConfig

from shared import subjects
from shared.broker import Broker
from shared.config import BrokerSettings
from shared.errors import RequestTooLarge, StorageShort
from tests.processes import NatsServer


async def test_headers_count(broker: Broker) -> None:
    """To the byte: the largest message is stored, one that is larger by one is refused, and the
    connection stays in both cases."""
    await broker.js.add_stream(StreamConfig(name="S", subjects=["s"]))
    headers = {subjects.HEADER_REPLY_TO: "_INBOX." + "ü" * 1000}
    block = len(b"NATS/1.0\r\nReply-To: \r\n\r\n") + len(headers["Reply-To"].encode())
    payload = bytes(broker.nc.max_payload - block)
    with pytest.raises(RequestTooLarge):
        await broker.publish_stored("s", payload + b"x", headers, patience_s=5)
    assert (await broker.publish_stored("s", payload, headers, patience_s=5)).seq == 1
    await broker.nc.flush()
    assert broker.nc.stats["reconnects"] == 0
    assert (await broker.js.stream_info("S")).state.messages == 1


async def test_a_full_store(tmp_path: Path) -> None:
    """Of the server, whose limit nobody can ask for: it is said at once, and passes with room. A
    message that was stored before is still known when it is sent again."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text("jetstream { max_file_store: 1MB }")
    with NatsServer(tmp_path / "nats", configuration) as server:
        broker = Broker(BrokerSettings(url=server.url), "test")
        await broker.connect()
        assert (await broker.js.account_info()).limits.max_storage == -1
        await broker.js.add_stream(StreamConfig(name="S", subjects=["s.*"]))
        first = await broker.publish_stored("s.1", b"x", {subjects.HEADER_MSG_ID: "1"}, 5)
        large = [broker.publish_stored("s.2", bytes(100_000), {}, 5) for _ in range(20)]
        outcomes = await asyncio.gather(*large, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PubAck, StorageShort}
        again = await broker.publish_stored("s.1", b"x", {subjects.HEADER_MSG_ID: "1"}, 5)
        assert (again.seq, again.duplicate) == (first.seq, True)
        await broker.js.purge_stream("S")
        await broker.publish_stored("s.2", bytes(100_000), {}, patience_s=5)
        await broker.close()
