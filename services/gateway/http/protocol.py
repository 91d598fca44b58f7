"""uvicorn's HTTP protocol with bounds: on heads, on time, and on what a client leaves unread."""

import time
from asyncio import BaseTransport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.http.connection_limit import Connections
from services.gateway.http.refusal import Refusal
from services.gateway.settings import GatewaySettings

LARGEST_HEAD_BYTES = 64 * 1024
LONGEST_URL_BYTES = 8 * 1024
MOST_HEADERS = 128

MOST_PIPELINED = 16
"""Requests behind the one that is being answered."""

BODY_BYTES_PER_S = 500
"""A body may take longer than the bound on its time while it comes at this rate."""

LARGEST_DISCARDED_BYTES = 64 * 1024 * 1024
"""Of a body whose request was answered before it came."""

LINGER_S = 5.0
"""How long a connection that closes has for what its client has not read yet."""

HEALTH_PATHS = ("/healthz", "/readyz")

NOT_HTTP = Refusal(400, "invalid_request", "what was sent is not a valid HTTP/1.1 request")
URL_TOO_LONG = Refusal(414, "url_too_long", f"the URL has more than {LONGEST_URL_BYTES} bytes")
HEAD_TOO_LARGE = Refusal(
    431,
    "head_too_large",
    f"the head of a request may have {LARGEST_HEAD_BYTES} bytes and {MOST_HEADERS} header lines",
)
TOO_MANY_PIPELINED = Refusal(
    429, "too_many_requests", f"no more than {MOST_PIPELINED} requests may wait on a connection"
)
HEAD_TOO_SLOW = Refusal(408, "request_timeout", "the head of the request did not arrive in time")
BODY_TOO_SLOW = Refusal(408, "request_timeout", "the body of the request did not arrive in time")
TOO_MANY_CONNECTIONS = Refusal(
    503, "too_many_connections", "the gateway has too many open connections; try again", 2
)


class StopParsing(Exception):
    """Raised in a callback of the parser, which then gives up; `_fault` says what is wrong."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What its client is late with is seen by `sweep`, once a second, which costs
    a request nothing."""

    def __init__(self, settings: GatewaySettings, connections: Connections, **server: Any) -> None:
        super().__init__(**server)
        self._settings = settings
        self._all = connections
        self._has_place = False
        self._answering: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the last one that came."""
        self._fault = NOT_HTTP
        self._head_bytes = 0
        self._body_bytes = 0
        self._unparsed_bytes = 0
        """Fed to the parser since it last gave anything back; it keeps them in memory."""
        # When what is going on now began, on the monotonic clock; None when it is not going on.
        self._idle_since: float | None = time.monotonic()
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._unread_since: float | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._has_place = self._all.open(self)
        if self._all.is_exhausted:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.close(self)
        super().connection_lost(exc)
        answering = self._answering
        if answering is not None and not answering.response_complete:
            # uvicorn marks the last request only, and would write to what is gone.
            answering.disconnected = True
            answering.message_event.set()
        self._unset_keepalive_if_required()

    def evict(self) -> None:
        self.transport.abort()

    def sweep(self, now: float) -> None:
        """Close the connection if its client is late."""
        settings = self._settings
        if self.transport.is_closing() and self._closing_since is None:
            self._closing_since = now
        if _is_over(self._closing_since, LINGER_S, now) or _is_over(
            self._unread_since, settings.send_timeout_s, now
        ):
            self.transport.abort()
        elif self._closing_since is not None:
            return
        elif _is_over(self._head_since, settings.head_timeout_s, now):
            self._refuse(HEAD_TOO_SLOW)
        elif self._body_since is not None and self.flow.read_paused:
            self._body_since = now  # it is the gateway that is not reading
        elif _is_over(self._body_since, self._body_timeout_s, now):
            self._refuse(BODY_TOO_SLOW)
        elif _is_over(self._idle_since, self._idle_timeout_s, now):
            self.transport.close()

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self._closing_since is not None:
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > LARGEST_HEAD_BYTES:
            self._refuse(HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._body_bytes = self._unparsed_bytes = 0
        self._head_since = time.monotonic()
        if self._idle_since is not None:
            self._idle_since = None
            self._all.waits(self)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._add_to_head(len(url))
        if len(self.url) > LONGEST_URL_BYTES:
            self._stop_parsing(URL_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for the trailers of a body in chunks."""
        super().on_header(name, value)
        self._add_to_head(len(name) + len(value) + len(": \r\n"))

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        self._head_since, self._body_since = None, time.monotonic()
        super().on_headers_complete()
        if len(self.pipeline) > MOST_PIPELINED:
            self._stop_parsing(TOO_MANY_PIPELINED)

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        self._body_bytes += len(body)
        if self.cycle.response_complete and self._body_bytes > LARGEST_DISCARDED_BYTES:
            self._stop_parsing(NOT_HTTP)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        self._body_since = None
        super().on_message_complete()
        self._all.works(self)
        self._note_idleness()

    # What the client gets

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not self._has_place and cycle.scope["path"] not in HEALTH_PATHS:
            app = TOO_MANY_CONNECTIONS
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last:
            self._note_idleness()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser gives up."""
        self._refuse(self._fault)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with ``refusal``, where an answer can stand, and close."""
        if self._closing_since is not None:
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or not cycle.more_body:
                # It would land in the middle of an answer, or before one.
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or not cycle.response_complete or self._body_since is None:
            self.transport.write(refusal.as_bytes(self.scope.get("path", "")))
        # Closed with something unread, the connection would be reset before the client has read
        # the answer. So what still comes is read, and dropped, until it hangs up; or for 5 s.
        self._closing_since = time.monotonic()
        self.transport.write_eof()
        self.flow.resume_reading()

    def _stop_parsing(self, refusal: Refusal) -> None:
        self._fault = refusal
        raise StopParsing

    def _add_to_head(self, size: int) -> None:
        self._unparsed_bytes = 0
        self._head_bytes += size
        if self._head_bytes > LARGEST_HEAD_BYTES or len(self.headers) > MOST_HEADERS:
            self._stop_parsing(HEAD_TOO_LARGE)

    def _note_idleness(self) -> None:
        if self._body_since is None and self.cycle.response_complete:
            if self._head_since is None:  # else the next request has begun
                self._idle_since = time.monotonic()
            self._all.waits(self)

    @property
    def _body_timeout_s(self) -> float:
        return self._settings.body_timeout_s + self._body_bytes / BODY_BYTES_PER_S

    @property
    def _idle_timeout_s(self) -> float:
        if self.cycle is None:  # it has never sent anything
            return self._settings.head_timeout_s
        return self._settings.keep_alive_s


def _is_over(since: float | None, timeout_s: float, now: float) -> bool:
    return since is not None and now - since > timeout_s
