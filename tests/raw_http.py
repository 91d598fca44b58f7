"""HTTP byte by byte, for what no client library would send."""

import re
import socket
import time
from collections.abc import Sequence

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


def exchange(port: int, pieces: Sequence[bytes], patience_s: float) -> bytes:
    """Send ``pieces`` one by one; everything that came back until the server hung up, or for
    ``patience_s`` of silence."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.settimeout(patience_s)
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.001)  # one segment each, mostly
            while data := connection.recv(1 << 16):
                answer += data
                if len(answer) > 1 << 20:
                    break
        except OSError:
            pass  # silence, or a server that has had enough
    return answer


def statuses(answer: bytes) -> list[int]:
    """Of all answers in what came back."""
    return [int(status) for status in _STATUS.findall(answer)]
