"""The NATS protocol byte by byte, for what no client library would send."""

import json
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shared.job_ids import new_job_id

CONNECT = b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\n'
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Received:
    subject: bytes
    headers: bytes
    data: bytes


class Closed(Exception):
    """The server has ended the connection, as it may when it cannot read what it is sent."""


class RawNats:
    """One connection. Subjects and headers are bytes: they may be anything."""

    def __init__(self, port: int) -> None:
        self.received: list[Received] = []
        """What came for the subscriptions, in order."""
        self._buffer = b""
        self._pongs = 0
        self._subscriptions = 0
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.send(CONNECT)
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Raises: Closed."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Closed(str(error)) from error

    def subscribe(self, subject: bytes) -> None:
        self._subscriptions += 1
        self.send(b"SUB %b %d\r\n" % (subject, self._subscriptions))

    def publish(
        self, subject: bytes, data: bytes = b"", reply: bytes = b"", headers: bytes | None = None
    ) -> None:
        """``headers`` is the whole block, with its first line and the empty last one."""
        self.send(publication(subject, data, reply, headers))

    def settle(self) -> None:
        """Until the server has read all that was sent, and its answers are in ``received``.

        Raises:
            Closed.
        """
        awaited = self._pongs + 1
        self.send(b"PING\r\n")
        deadline = time.monotonic() + PATIENCE_S
        while self._pongs < awaited:
            self._read(deadline)

    def request(self, subject: bytes, data: bytes = b"", patience_s: float = PATIENCE_S) -> bytes:
        """The data of the first reply.

        Raises:
            Closed, TimeoutError.
        """
        inbox = f"_INBOX.{new_job_id()}".encode()
        self.subscribe(inbox)
        self.publish(subject, data, inbox)
        return self.wait_for(inbox, 1, patience_s)[0].data

    def wait_for(
        self, subject: bytes, count: int, patience_s: float = PATIENCE_S
    ) -> list[Received]:
        """The first ``count`` messages to this subject.

        Raises:
            Closed, TimeoutError.
        """
        deadline = time.monotonic() + patience_s
        while len(found := [one for one in self.received if one.subject == subject]) < count:
            self._read(deadline)
        return found[:count]

    def _read(self, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the broker sent nothing in time")
        self._socket.settimeout(left_s)
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            raise TimeoutError("the broker sent nothing in time") from None
        except OSError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed("end of stream")
        self._buffer += data
        while self._take_one():
            pass

    def _take_one(self) -> bool:
        """Take one operation of the server's off the buffer, if it is there as a whole."""
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return False
        operation, *words = line.split(b" ")
        if operation in (b"MSG", b"HMSG"):
            size = int(words[-1])
            if len(rest) < size + 2:
                return False
            headers = int(words[-2]) if operation == b"HMSG" else 0
            self.received.append(Received(words[0], rest[:headers], rest[headers:size]))
            rest = rest[size + 2 :]
        elif operation == b"PONG":
            self._pongs += 1
        elif operation == b"PING":
            self.send(b"PONG\r\n")
        self._buffer = rest
        return True


def publication(
    subject: bytes, data: bytes = b"", reply: bytes = b"", headers: bytes | None = None
) -> bytes:
    """A PUB, or an HPUB if there are ``headers``."""
    reply = reply + b" " if reply else b""
    if headers is None:
        return b"PUB %b %b%d\r\n%b\r\n" % (subject, reply, len(data), data)
    size = len(headers)
    return b"HPUB %b %b%d %d\r\n%b%b\r\n" % (
        subject,
        reply,
        size,
        size + len(data),
        headers,
        data,
    )


def stream_names(connection: RawNats) -> list[str]:
    """Every stream that the broker has."""
    return sorted(json.loads(connection.request(b"$JS.API.STREAM.NAMES"))["streams"])
