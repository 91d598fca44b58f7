"""HTTP as no client writes it."""

from hypothesis import strategies as st

METHODS = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"PRI", b"get", b"")
PATHS = (
    *(b"/healthz", b"/readyz", b"/jobs", b"/queue", b"/inferers", b"/dead", b"/v1/models"),
    *(b"/v1/chat/completions", b"/v1/completions", b"/concurrency", b"/schema/openapi.json"),
    *(b"/status/x", b"/jobs/x/events", b"/dead/x/retry", b"/v1/models/x", b"/", b"*", b""),
)
VERSIONS = (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"")
HEADERS = (
    *(b"Host: x:abc", b"Host: [", b"Host: \xff", b"Host: a\r\nHost: b", b"Host:"),
    *(
        b"Content-Length: 5",
        b"Content-Length: -1",
        b"Content-Length: 1e9",
    ),
    *(b"Content-Length: 99999999999999999999", b"Content-Length: 5\r\nContent-Length: 6"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, identity", b"TE: \x0b"),
    *(b"Expect: 100-continue", b"Upgrade: websocket\r\nConnection: upgrade", b"Connection: close"),
    *(b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",),
    *(
        b"Content-Type: \xff/\xff",
        b"Content-Type: text/plain; charset=\xff",
        b"Content-Encoding: gzip",
    ),
    *(b"Prefer: wait=9999999999999999999", b'Prefer: wait="', b"Prefer: ,;=", b"Idempotency-Key: "),
    *(b"Last-Event-ID: \xff", b"Last-Event-ID: 99999999999999999999999", b"X-Request-Id: \x80"),
    *(b"Origin: null", b"Range: bytes=0-", b"Accept: \xff", b"Cookie: =;=;", b": x", b" folded"),
)
CHUNKS = (
    *(
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"0\r\nTrailer: x\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"-1\r\n",
    ),
    *(b"5;ext=" + b"x" * 5_000 + b"\r\nhello\r\n", b"5\nhello\n", b"zz\r\n", b"\r\n", b"{}"),
)


def _headers() -> st.SearchStrategy[bytes]:
    name = st.one_of(st.sampled_from((b"Host", b"Prefer", b"Idempotency-Key")), _token())
    written = st.tuples(name, st.binary(max_size=80)).map(b": ".join)
    many = st.integers(1, 3_000).map(lambda count: b"\r\n".join([b"X-A: b"] * count))
    return st.one_of(st.sampled_from(HEADERS), st.sampled_from(HEADERS), written, many)


def _token() -> st.SearchStrategy[bytes]:
    return st.text(st.characters(codec="ascii"), min_size=1, max_size=20).map(str.encode)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request line, headers and a body that may have little to do with each other."""
    path = draw(st.sampled_from(PATHS))
    match draw(st.integers(0, 5)):
        case 0:
            path = b"http://127.0.0.1" + path
        case 1:
            path += draw(st.binary(max_size=30))
        case 2:
            path += b"?" + draw(st.one_of(st.binary(max_size=40), st.just(b"a" * 70_000)))
    first = b" ".join((draw(st.sampled_from(METHODS)), path, draw(st.sampled_from(VERSIONS))))
    headers = draw(st.lists(_headers(), max_size=5))
    if draw(st.booleans()):
        headers.insert(0, b"Host: 127.0.0.1")
    body = b"".join(draw(st.lists(st.one_of(st.sampled_from(CHUNKS), st.binary()), max_size=3)))
    end = draw(st.sampled_from((b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"")))
    return b"\r\n".join((first, *headers)) + end + body


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Some requests on one connection, cut anywhere."""
    sent = b"".join(
        draw(st.lists(st.one_of(requests(), st.binary(max_size=100)), min_size=1, max_size=4))
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=4)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    return [piece for piece in pieces if piece]
