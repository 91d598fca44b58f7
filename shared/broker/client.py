"""nats-py's client, made to live as long as its process: the one place for its private members."""

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.protocol import parser

CHECK_EVERY_S = 10.0
RECOVERY_S = 0.25
"""How long the client's own reaction may take before a task that has ended is replaced."""

FLUSH_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 1.0
"""How often a flush looks whether its ping was lost with a connection."""

MOST_WRITTEN_AT_ONCE = 64 * 1024
"""Bytes; with more, asyncio's transports ask their writers to wait."""

TURNS = 2
"""How many turns of the event loop a message may wait for others, which go out in the same write:
so many lie between the acknowledgement of a job and the pull of the next."""

LONGEST_SUBJECTS = 4000
"""Bytes of a subject and its reply together: the server hangs up on lines of more than 4,096."""

# For the broker, vertical tabs and form feeds are part of a subject; for nats-py they end it:
# "MSG a\v7 1 2" would be a message of two bytes for the subscription 7.
parser.MSG_RE = re.compile(
    rb"\AMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)\r\n"
)
parser.HMSG_RE = re.compile(
    rb"\AHMSG[ \t]+([^ \t\r\n]+)[ \t]+([^ \t\r\n]+)[ \t]+(([^ \t\r\n]+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n"
)


class Message(Msg):
    async def respond(self, data: bytes) -> None:
        """Answer, if there is a reply subject; nats.micro also answers requests without one."""
        if self.reply:
            await super().respond(data)


class Connection(Client):
    """A client that only `close` closes.

    nats-py closes for good on nearly every error that the broker names, and what it does not expect
    ends the task that reads, writes or reconnects, while the client says that it is connected. Here
    a message that cannot be parsed costs that message at most, and everything else a new connection
    with the same subscriptions.
    """

    msg_class = Message

    def __init__(self, on_unreadable: Callable[[str, Exception], None]) -> None:
        """``on_unreadable`` is called with the subject of each message that nats-py cannot parse,
        as far as it is known, and with the reason."""
        super().__init__()
        self._on_unreadable = on_unreadable
        self._is_wanted = True
        self._receivers: dict[int, Callable[[Msg], None]] = {}
        """By the number of their subscription."""
        self._inboxes: dict[str, Callable[[Msg], None]] = {}
        self._inbox_root: str | None = None
        self._inbox_numbers = itertools.count()
        self._is_write_due = False

    async def supervise(self) -> None:
        """Reconnect whenever a task that the client needs has ended. Runs until cancelled."""
        while True:
            running = [task for task in self._vital_tasks if task is not None]
            if running:
                await asyncio.wait(
                    running, timeout=CHECK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
            await asyncio.sleep(RECOVERY_S)
            if self._is_wanted and any(task is None or task.done() for task in self._vital_tasks):
                await self._error_cb(errors.Error("nats: the connection's tasks have ended"))
                await self._start_over()

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """As nats-py's, but refuses what would make the broker close the connection.

        Raises:
            nats.errors.MaxPayloadError: payload and headers together are too large.
            nats.errors.BadSubjectError: also where subject and reply are too long.
        """
        if len(subject.encode()) + len(reply.encode()) > LONGEST_SUBJECTS:
            raise errors.BadSubjectError
        if len(payload) + header_size(headers or {}) > self.max_payload:
            raise errors.MaxPayloadError
        await super().publish(subject, payload, reply, headers)

    async def subscribe_directly(
        self, subject: str, receive: Callable[[Msg], None]
    ) -> Subscription:
        """As `subscribe`, but ``receive`` is called as soon as a message has been read, without a
        queue and a task in between. It must be quick: nothing else is read meanwhile."""
        number = self._sid + 1
        self._receivers[number] = receive
        try:
            return await self.subscribe(subject)
        except BaseException:  # a cancellation, too: nothing would ever unsubscribe
            self._remove_sub(number)
            raise

    def readdressed(self, message: Msg, subject: str, reply: str, headers: dict[str, str]) -> Msg:
        """A copy of ``message`` with this subject, reply subject and headers."""
        return self.msg_class(
            subject=subject,
            reply=reply,
            data=message.data,
            headers=headers,
            _client=self,
            _sid=message._sid,
        )

    async def end_at_broker(self, subscription: Subscription) -> None:
        """Have the broker send nothing more to it; what is on its way is still received."""
        await self._send_unsubscribe(subscription._id)

    async def move(self, subscription: Subscription, subject: str) -> None:
        """Have it receive ``subject`` in place of its own; what is on its way is still received."""
        subscription._subject = subject
        if self.is_connected:  # else a reconnect does it
            await self._send_unsubscribe(subscription._id)
            await self._send_subscribe(subscription)

    async def open_inbox(self, receive: Callable[[Msg], None]) -> str:
        """A subject for answers: ``receive``, which must be quick, is called with each, until
        `close_inbox`. All inboxes share one subscription."""
        if self._inbox_root is None:
            self._inbox_root = self.new_inbox()
            await self.subscribe_directly(f"{self._inbox_root}.*", self._receive_answer)
        inbox = f"{self._inbox_root}.{next(self._inbox_numbers)}"
        self._inboxes[inbox] = receive
        return inbox

    def close_inbox(self, inbox: str) -> None:
        self._inboxes.pop(inbox, None)

    def _receive_answer(self, answer: Msg) -> None:
        receive = self._inboxes.get(answer.subject)
        if receive is not None:
            receive(answer)

    async def _request_new_style(
        self,
        subject: str,
        payload: bytes,
        timeout: float = 1,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        # nats-py's uses `wait_for`, which may lose a cancellation, and takes twice the time.
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Msg] = loop.create_future()
        inbox = await self.open_inbox(partial(resolve, answered))
        timer = loop.call_later(timeout, _give_up, answered, errors.TimeoutError())
        try:
            await self.publish(subject, payload, reply=inbox, headers=headers)
            return await answered
        finally:
            timer.cancel()
            self.close_inbox(inbox)

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        # nats-py's looks at each character of each name.
        headers = {}
        for line in raw.split(b"\r\n"):
            raw_name, colon, value = line.partition(b":")
            if not (colon and raw_name.isascii()):
                continue
            name = raw_name.strip().decode()
            if not name or name.split() == [name]:  # no white space inside
                headers[name] = value.strip().decode("utf-8", "replace")
        return headers

    def parse_headers(self, block: bytes) -> dict[str, str]:
        """The headers of a stored message, as it was sent."""
        return self._parse_header_lines(block.partition(b"\r\n")[2])

    async def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> None:
        """Return when the broker has handled everything that was sent before, and what it sent in
        turn has arrived. After a reconnect, return when the broker has the subscriptions again.

        Raises:
            nats.errors.FlushTimeoutError: no answer for ``timeout`` seconds.
            nats.errors.ConnectionClosedError: this client was closed.
        """
        loop = asyncio.get_running_loop()
        pong: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(timeout, _give_up, pong, errors.FlushTimeoutError())
        try:
            while not pong.done():
                if self.is_closed:
                    raise errors.ConnectionClosedError
                # With each connection, nats-py forgets the pings that were sent on it.
                if self.is_connected and pong not in self._pongs:
                    # A transport that is already closed raises; soon there is another.
                    with cancellation_kept(), suppress(OSError, RuntimeError):
                        await self._send_ping(pong)
                await asyncio.wait((pong,), timeout=LOOK_AGAIN_S)
            pong.result()
        finally:
            timer.cancel()
            pong.cancel()

    async def close(self) -> None:
        self._is_wanted = False
        await super().close()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        is_little = self._pending_data_size <= MOST_WRITTEN_AT_ONCE
        if force_flush or not (is_little and self.is_connected):
            return await super()._flush_pending(force_flush)
        if not self._is_write_due:
            self._is_write_due = True
            self._write_after(TURNS)
        return None

    def _write_after(self, turns: int) -> None:
        """Write once the event loop has come round, and ``turns`` times more."""
        call = partial(self._write_after, turns - 1) if turns else self._write_pending
        asyncio.get_running_loop().call_soon(call)

    def _write_pending(self) -> None:
        """Write what the client holds back, if it is little and the broker keeps up. The client's
        own task does the rest: it waits for the broker, and handles errors."""
        self._is_write_due = False
        if not self._pending:
            return
        writer = getattr(self._transport, "_io_writer", None)
        is_little = self._pending_data_size <= MOST_WRITTEN_AT_ONCE
        if is_little and self.is_connected and writer is not None and _is_idle(writer.transport):
            writer.transport.writelines(self._pending)
            self._pending = []
            self._pending_data_size = 0
        elif self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # nats-py writes the ping at once, ahead of what it holds back; also in `drain`.
        if self._pending and self._transport is not None:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        # nats-py's raises for a ping whose sender no longer waits, and then reads nothing more.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    @property
    def _vital_tasks(self) -> list[asyncio.Task[None] | None]:
        if self.is_connected:
            return self._tasks
        return [self._reconnection_task]

    @property
    def _tasks(self) -> list[asyncio.Task[None] | None]:
        """What a connection consists of."""
        return [self._reading_task, self._flusher_task, self._ping_interval_task]

    async def _start_over(self) -> None:
        self._status = Client.CONNECTED  # else nats-py assumes a reconnect in progress
        await self.force_reconnect()

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if status == Client.CLOSED and self._is_wanted:
            await self._start_over()
        else:
            await super()._close(status, do_cbs)

    async def _process_err(self, err_msg: str) -> None:
        # The broker closes the connection itself if it means to, and then it is made again.
        await self._error_cb(errors.Error(f"nats: {err_msg}"))

    async def _process_connect_init(self) -> None:
        # An attempt that failed late has left them behind.
        for task in self._tasks:
            if task is not None:
                task.cancel()
        try:
            await super()._process_connect_init()
        except (OSError, errors.Error):
            raise
        except Exception as error:  # uvloop's RuntimeError for a reset, invalid UTF-8
            raise errors.Error(f"nats: the handshake failed: {error}") from error

    async def _attempt_reconnect(self) -> None:
        # What was held back is lost with its connection, as if it had been written: subscriptions
        # are made again anyway, and a pull or nak that is sent late takes a job from its inferer.
        self._pending, self._pending_data_size = [], 0
        # If the peer no longer reads, a graceful close never ends.
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        await super()._attempt_reconnect()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        try:
            receive = self._receivers.get(sid)
            if receive is None:
                await super()._process_msg(sid, subject, reply, data, headers)
                return
            self.stats["in_msgs"] += 1
            self.stats["in_bytes"] += len(data)
            known = await self._process_headers(headers)
            receive(self._build_message(sid, subject, reply, data, known))
        except Exception as error:
            self._on_unreadable(_text(subject), error)

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._receivers.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except Exception as error:
            # Deliver it without them: a job that is never received is redelivered for ever.
            self._on_unreadable("headers", error)
            return None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        return self.msg_class(
            subject=_text(subject),
            # An answer must not go to a subject that only resembles the intended one.
            reply=_text(reply) if _is_text(reply) else "",
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )


def client_of(message: Msg) -> Client:
    """The client that received the message."""
    return message._client


def consumer_of(subscription: JetStreamContext.PushSubscription) -> str:
    """The name of its current consumer; an ordered subscription may replace its consumer."""
    return subscription._consumer


def resolve(waiting: asyncio.Future[Msg], answer: Msg) -> None:
    """Set the result of a future, unless it is done."""
    if not waiting.done():
        waiting.set_result(answer)


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Raise a cancellation that was lost inside the block. Before Python 3.12 `asyncio.wait_for`,
    which nats-py uses, loses one that arrives together with the awaited result; the cancelled task
    would then run for ever."""
    task = asyncio.current_task()
    assert task is not None
    known = task.cancelling()
    yield
    if task.cancelling() > known:
        raise asyncio.CancelledError


def header_size(headers: dict[str, str]) -> int:
    """The bytes of headers on the wire: a line each, ``NATS/1.0`` before and an empty one after."""
    if not headers:
        return 0
    lines = (len(name.encode()) + len(value.encode()) + 4 for name, value in headers.items())
    return len(b"NATS/1.0\r\n\r\n") + sum(lines)


def _is_idle(transport: asyncio.WriteTransport) -> bool:
    return not transport.is_closing() and transport.get_write_buffer_size() == 0


def _give_up(answer: asyncio.Future[Any], error: errors.Error) -> None:
    if not answer.done():
        answer.set_exception(error)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
