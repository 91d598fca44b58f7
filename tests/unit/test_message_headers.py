"""The headers of messages, read without nats-py's check of each letter."""

import random
import tracemalloc

import pytest
from nats.aio.client import Client

from shared.broker.client import Connection

NAMES = (b"Nats-Subject", b" Nats-Sequence ", b"Two words", b"Tab\there", b"", b"\xc3\xa9", b"\x1c")
COLONS = (b":", b": ", b":\t", b"", b"::")
VALUES = (b"infer.results.tiny.1", b" 7 ", b"", b"a: b", "größe".encode(), b"\xff", b"a\x0bb\x85")
ENDS = (b"\r\n", b"\r\n\r\n", b"\n", b"")


@pytest.mark.parametrize("seed", range(20))
def test_headers_are_read_as_nats_py_reads_them(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(200):
        block = b"".join(
            choose.choice(part) for _ in range(5) for part in (NAMES, COLONS, VALUES, ENDS)
        )
        assert Connection._parse_header_lines(block) == Client._parse_header_lines(block), block


def test_no_header_is_kept() -> None:
    """Whoever may publish chooses their names, which may be long."""
    tracemalloc.start()
    try:
        for number in range(500):
            Connection._parse_header_lines(b"%d%s: value\r\n" % (number, 100_000 * b"x"))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10_000_000
