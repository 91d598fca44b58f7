"""HTTP as bytes on a connection, for what no client library would send."""

import re
import socket
from collections.abc import Sequence
from contextlib import suppress

import httpx2

Answer = tuple[int, bytes]
"""Status and body; status 0 where the connection was closed without an answer."""


def connect(url: str, *, receive_bytes: int | None = None) -> socket.socket:
    """A connection; with ``receive_bytes`` of room for what is not read."""
    parts = httpx2.URL(url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(60)
    connection.connect((parts.host, parts.port))
    return connection


def ask(url: str, request: bytes) -> Answer:
    """Send ``request`` as it is, read until the connection closes."""
    with connect(url) as connection:
        with suppress(OSError):  # refused before it was all sent
            connection.sendall(request)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> Answer:
    """What comes until the connection closes."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def exchange(url: str, pieces: Sequence[bytes], silence_s: float) -> bytes:
    """Send ``pieces`` one by one; what came until the connection closed, or nothing for so long."""
    received = b""
    with connect(url) as connection, suppress(OSError):
        connection.settimeout(silence_s)
        for piece in pieces:
            connection.sendall(piece)
        while part := connection.recv(65536):
            received += part
    return received


def statuses(received: bytes) -> list[int]:
    """Of all answers in what came."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received)]


def get(url: str, path: str = "/healthz", *lines: str, close: bool = True) -> bytes:
    """The bytes of a GET with these header lines; without a Host among them with the right one."""
    if not any(line.lower().startswith("host:") for line in lines):
        lines = (f"Host: {httpx2.URL(url).netloc.decode()}", *lines)
    if close:
        lines = (*lines, "Connection: close")
    return "\r\n".join((f"GET {path} HTTP/1.1", *lines, "", "")).encode("latin-1")


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has closed by now."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
