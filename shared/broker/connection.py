"""One connection to the broker: it always reconnects, logs outages, and turns them into errors."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from shared.background import keep_running
from shared.broker.client import Connection, header_size
from shared.broker.clock import BrokerClock
from shared.broker.refusals import IMPOSSIBLE, TRANSIENT, refusal_of, sentence_of
from shared.broker.stored_messages import StoredMessage
from shared.config import BrokerSettings
from shared.errors import (
    BrokerUnavailable,
    RequestTooLarge,
)
from shared.logs import logger
from shared.wire.codecs import skip

HEADER_ROOM = 8 * 1024
"""The room that payloads leave for headers: the server counts both against its limit."""

REQUEST_TIMEOUT_S = 2.0
RETRY_DELAY_S = 0.2

PAGE = 1000
"""Messages that are asked for at a time."""

READ_CLOCK_EVERY_S = 10.0

PING_EVERY_S = 3
"""A server that owes two answers is left for another: after 9 s, so that a lease does not run out
meanwhile."""

NO_SUCH_MESSAGE = (10043, 10057)

T = TypeVar("T")
log = logger()


class Stored(msgspec.Struct, frozen=True):
    """The broker's answer to a message that was published to a stream."""

    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] = {}


class _Purged(msgspec.Struct, frozen=True):
    purged: int = 0
    error: dict[str, Any] = {}


_decode_purged = msgspec.json.Decoder(_Purged).decode
_decode_stored = msgspec.json.Decoder(Stored).decode


class Broker:
    """A connection that is made in the background, and made again whenever it is lost.

    Nothing here waits for an outage to end unless it says so: callers get `BrokerUnavailable`.
    """

    def __init__(self, settings: BrokerSettings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._outage_logged = False
        self._closing = False
        self._on_reconnect: list[Callable[[], None]] = []
        self._clock = BrokerClock()
        self._reading_clock: asyncio.Task[None] | None = None
        self._supervising: asyncio.Task[None] | None = None
        self.nc = Connection(lambda subject, error: skip("message", subject, error))
        self.js: JetStreamContext = self.nc.jetstream(timeout=REQUEST_TIMEOUT_S)

    @property
    def is_connected(self) -> bool:
        return self.nc.is_connected

    @property
    def max_body(self) -> int:
        """The largest payload, in bytes, that leaves room for headers."""
        return self.nc.max_payload - HEADER_ROOM

    def now(self) -> datetime:
        """The broker's time; every deadline and every time on the wire is its, not a host's."""
        return self._clock.now()

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` on the event loop after each reconnect, until what this returns is
        called."""
        self._on_reconnect.append(callback)
        return lambda: self._on_reconnect.remove(callback)

    async def until_connected(self) -> None:
        """Wait for the end of an outage, if there is one."""
        connected = asyncio.Event()
        forget = self.on_reconnect(connected.set)
        try:
            if not self.is_connected:
                await connected.wait()
        finally:
            forget()

    async def connect(self) -> None:
        """Connect, however long it takes."""
        while not self.nc.is_connected:
            try:
                await self.nc.connect(
                    self._settings.servers,
                    name=self._name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]  # any number of seconds
                    connect_timeout=2,
                    ping_interval=PING_EVERY_S,
                    error_cb=self._log_error,
                    disconnected_cb=self._log_disconnected,
                    reconnected_cb=self._announce_reconnected,
                )
            except (nats.errors.Error, OSError) as error:
                await self._log_error(error)
                await asyncio.sleep(RETRY_DELAY_S)
        self._outage_logged = False
        self._supervising = keep_running(self.nc.supervise, "broker supervision")
        await self._read_clock()
        self._reading_clock = keep_running(self._keep_reading_clock, "broker clock")
        log.info("broker_connected", url=self._url)

    async def close(self) -> None:
        self._closing = True
        for task in (self._supervising, self._reading_clock):
            if task is not None:
                task.cancel()
        # While the broker is away the client writes what it still holds to a transport that is
        # closed; that is expected.
        with suppress(nats.errors.Error, OSError, RuntimeError):
            await self.nc.close()

    async def direct_get(self, stream: str, **query: Any) -> StoredMessage | None:
        """One stored message, from any replica; None if the stream does not hold it.

        ``query`` is the body of the direct get API (ADR-31), ``last_by_subj="…"`` for example.

        Raises:
            BrokerUnavailable: no answer.
        """
        return await self._direct_get(
            stream, f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query)
        )

    async def _direct_get(self, stream: str, api: str, query: bytes) -> StoredMessage | None:
        with unavailable_on_outage(self):
            answer = await self.nc.request(api, query, REQUEST_TIMEOUT_S)
        return StoredMessage.of_direct_answer(stream, answer)

    async def subject_get(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message of ``subject``, from any replica; None if the stream holds none of it.

        The subject of the API call contains ``subject``, so permission can be granted for it alone.
        Inferers read in no other way.

        Raises:
            BrokerUnavailable: no answer.
        """
        return await self._direct_get(stream, f"$JS.API.DIRECT.GET.{stream}.{subject}", b"")

    async def leader_get(self, stream: str, *, last_by_subj: str) -> StoredMessage | None:
        """Like `direct_get`, but only from the stream's leader, because a replica may lag behind.

        Raises:
            BrokerUnavailable: no answer.
        """
        # Not by the client's own method, which returns headers that are not ASCII as objects.
        with unavailable_on_outage(self):
            answer = await self.nc.request(
                f"$JS.API.STREAM.MSG.GET.{stream}",
                msgspec.json.encode({"last_by_subj": last_by_subj}),
                REQUEST_TIMEOUT_S,
            )
        return StoredMessage.of_leader_answer(stream, answer, self.nc.parse_headers)

    async def direct_get_all(self, stream: str, **query: Any) -> list[StoredMessage]:
        """All stored messages a batched query finds, ``multi_last=["…"]`` for example, of at most
        1,024 subjects.

        Raises:
            BrokerUnavailable: no answer, or one that broke off.
        """
        found: list[StoredMessage] = []
        ended = asyncio.get_running_loop().create_future()

        def receive(answer: Msg) -> None:
            if ended.done():
                return
            try:
                stored = StoredMessage.of_direct_answer(stream, answer)
            except BrokerUnavailable as error:
                ended.set_exception(error)
            else:
                if stored is None:
                    ended.set_result(None)
                else:
                    found.append(stored)

        with unavailable_on_outage(self):
            inbox = await self.nc.open_inbox(receive)
            try:
                await self.nc.publish(
                    f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), reply=inbox
                )
                count = -1
                while not ended.done():
                    if len(found) == count:
                        raise nats.errors.TimeoutError
                    count = len(found)
                    await asyncio.wait((ended,), timeout=REQUEST_TIMEOUT_S)
                ended.result()
                return found
            finally:
                self.nc.close_inbox(inbox)

    async def last_of_each(self, stream: str, wildcard: str) -> list[StoredMessage]:
        """The last message of each subject that ``wildcard`` covers, however many there are.

        Page by page, from the oldest message to the newest: one answer to ``multi_last`` has no
        more than 1,024 subjects. What is replaced meanwhile comes again with a later page; on a
        cluster it may be missed, where a later page comes from a replica that lags.

        Raises:
            BrokerUnavailable: no answer, or one that broke off.
        """
        last: dict[str, StoredMessage] = {}
        async for page in self.pages(stream, wildcard):
            last.update((stored.subject, stored) for stored in page)
        return list(last.values())

    async def pages(
        self, stream: str, wildcard: str, **bounds: int
    ) -> AsyncIterator[list[StoredMessage]]:
        """All messages of ``wildcard``, the oldest first, as many at a time as ``bounds`` allow:
        ``batch``, in messages, and ``max_bytes``. It ends with what was there when the last page
        was read: otherwise a reading of entries that are always refreshed would go on for ever.

        Raises:
            BrokerUnavailable: no answer, or one that broke off.
        """
        sequence = 0
        bounds = {"batch": PAGE} | bounds
        while page := await self.direct_get_all(
            stream, seq=sequence + 1, next_by_subj=wildcard, **bounds
        ):
            yield page
            if page[-1].pending_after == 0:
                return
            sequence = page[-1].sequence

    async def publish_stored(
        self, subject: str, payload: bytes, headers: dict[str, str], patience_s: float
    ) -> Stored:
        """Publish and wait until a stream holds it, retrying outages for ``patience_s``.

        A publish that timed out can still have landed: the headers must make a retry harmless
        (``Nats-Msg-Id`` or an expected sequence).

        Raises:
            BrokerUnavailable: not confirmed in time; it may have landed all the same.
            StorageShort: the broker has no room for it, and does not hold it.
            StreamRefused: the stream takes no such message, and does not hold it.
            StoredAlready: the expected sequence is not the last one; possibly because an earlier
                try of this call was stored.
            RequestTooLarge: it is larger than the broker accepts.
        """
        size = len(payload) + header_size(headers)
        if size > self.nc.max_payload:
            raise RequestTooLarge(
                f"the message has {size} bytes with its headers, more than the broker accepts "
                f"({self.nc.max_payload})"
            )
        give_up_at = time.monotonic() + patience_s
        may_have_landed = False
        while True:
            failure: nats.errors.Error
            if self.is_connected:
                try:
                    return await self._publish(subject, payload, headers)
                except (nats.js.errors.APIError, *TRANSIENT, *IMPOSSIBLE) as error:
                    if refusal := refusal_of(subject, error, may_have_landed):
                        raise refusal from error
                    # Whatever becomes of the next try.
                    failure, may_have_landed = error, True
            else:
                # The client would keep it, and send it long after our caller has given up.
                failure = nats.errors.ConnectionReconnectingError()
            if time.monotonic() >= give_up_at:
                raise BrokerUnavailable(sentence_of(failure)) from failure
            await asyncio.sleep(RETRY_DELAY_S)

    async def _publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> Stored:
        """Like the client's own `publish`, whose decoding takes ten times as long."""
        try:
            answer = await self.nc.request(subject, payload, REQUEST_TIMEOUT_S, headers=headers)
        except nats.errors.NoRespondersError:
            raise nats.js.errors.NoStreamResponseError from None
        stored = _decode_stored(answer.data)
        if stored.error:
            raise nats.js.errors.APIError.from_error(stored.error)
        return stored

    async def through_outages(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat ``call`` until the broker answers, and return its result. Other errors are
        raised."""
        while True:
            try:
                return await call()
            except BrokerUnavailable:
                await self.until_connected()
                await asyncio.sleep(RETRY_DELAY_S)

    async def delete(self, stream: str, sequence: int) -> None:
        """Remove one stored message, unless somebody else has done so.

        Raises:
            BrokerUnavailable: no answer, or it could not.
        """
        # Not by the client's own method, which erases securely and takes up to 150 ms.
        with unavailable_on_outage(self):
            answer = await self.nc.request(
                f"$JS.API.STREAM.MSG.DELETE.{stream}",
                msgspec.json.encode({"seq": sequence, "no_erase": True}),
                REQUEST_TIMEOUT_S,
            )
        error = msgspec.json.decode(answer.data).get("error", {})
        if error and error.get("err_code") not in NO_SUCH_MESSAGE:
            raise BrokerUnavailable(
                f"the broker could not delete a message of {stream}: {error.get('description')}"
            )

    async def purge(self, stream: str, subject: str, sequence: int | None = None) -> int:
        """Remove the messages of ``subject``, only up to ``sequence`` if it is given. This writes
        no marker, which would need storage. Returns the number of removed messages: of several
        calls for one message, only one removes it.

        Raises:
            BrokerUnavailable: no answer, or it could not.
        """
        until = {} if sequence is None else {"seq": sequence + 1}
        with unavailable_on_outage(self):
            answer = await self.nc.request(
                f"$JS.API.STREAM.PURGE.{stream}",
                msgspec.json.encode({"filter": subject} | until),
                REQUEST_TIMEOUT_S,
            )
        purged = _decode_purged(answer.data)
        if purged.error:
            raise BrokerUnavailable(
                f"the broker could not purge {stream}: {purged.error.get('description')}"
            )
        return purged.purged

    async def _read_clock(self) -> None:
        try:
            await self._clock.read(self.nc, REQUEST_TIMEOUT_S)
        except (nats.errors.Error, ValueError) as error:
            if not self._clock.is_known and self.is_connected:
                log.warning("broker_time_unknown", error=sentence_of(error), used="this host's")

    async def _keep_reading_clock(self) -> None:
        while True:
            await asyncio.sleep(READ_CLOCK_EVERY_S if self._clock.is_known else RETRY_DELAY_S)
            await self._read_clock()

    @property
    def _url(self) -> str:
        url = self.nc.connected_url
        return url.netloc.rpartition("@")[2] if url else ""

    async def _log_error(self, error: Exception) -> None:
        # The client reports every failed attempt; one line an outage is enough.
        if not self.nc.is_connected:
            if self._outage_logged:
                return
            self._outage_logged = True
        log.warning("broker_error", error=str(error) or type(error).__name__)

    async def _log_disconnected(self) -> None:
        if not self._closing:
            log.warning("broker_disconnected")

    async def _announce_reconnected(self) -> None:
        self._outage_logged = False
        log.info("broker_reconnected", url=self._url)
        for callback in list(self._on_reconnect):
            callback()


@contextmanager
def unavailable_on_outage(broker: Broker) -> Iterator[None]:
    """Turn an outage inside the block into `BrokerUnavailable`; refuse at once while away."""
    if not broker.is_connected:
        raise BrokerUnavailable("the connection to the broker is down")
    try:
        yield
    except TRANSIENT as error:
        raise BrokerUnavailable(sentence_of(error)) from error


@asynccontextmanager
async def connected(settings: BrokerSettings, name: str) -> AsyncIterator[Broker]:
    """A broker that is connected, closed at the end of the block. Waits for as long as it takes."""
    broker = Broker(settings, name)
    await broker.connect()
    try:
        yield broker
    finally:
        await broker.close()
