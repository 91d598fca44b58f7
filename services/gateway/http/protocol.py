"""uvicorn's HTTP protocol with limits on request heads, on time, and on unread responses."""

import time
from asyncio import BaseTransport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.http.connection_limit import ConnectionLimit
from services.gateway.http.error_response import ErrorResponse
from services.gateway.settings import GatewaySettings

MAX_HEAD_BYTES = 64 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 128

MAX_PIPELINED = 16
"""Requests behind the one that is being handled."""

MIN_BODY_BYTES_PER_S = 500
"""A body may take longer than its timeout while it arrives at this rate."""

MAX_DISCARDED_BYTES = 64 * 1024 * 1024
"""Of a body that arrives after its request was answered."""

LINGER_S = 5.0
"""How long a closing connection waits for its client to read the response."""

HEALTH_PATHS = ("/healthz", "/readyz")

NOT_HTTP = ErrorResponse(400, "invalid_request", "the request is not valid HTTP/1.1")
URL_TOO_LONG = ErrorResponse(414, "url_too_long", f"the URL has more than {MAX_URL_BYTES} bytes")
HEAD_TOO_LARGE = ErrorResponse(
    431,
    "head_too_large",
    f"the head of the request exceeds {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} header lines",
)
TOO_MANY_PIPELINED = ErrorResponse(
    429, "too_many_requests", f"at most {MAX_PIPELINED} requests may be pipelined on a connection"
)
HEAD_TOO_SLOW = ErrorResponse(
    408, "request_timeout", "the head of the request did not arrive in time"
)
BODY_TOO_SLOW = ErrorResponse(
    408, "request_timeout", "the body of the request did not arrive in time"
)
TOO_MANY_CONNECTIONS = ErrorResponse(
    503, "too_many_connections", "the gateway has too many open connections; try again", 2
)


class StopParsing(Exception):
    """Raised in a callback of the parser to end it; `_parse_error` is the response."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `check_timeouts` is called once a second, which is cheaper than a timer for
    each request."""

    def __init__(
        self, settings: GatewaySettings, connections: ConnectionLimit, **server: Any
    ) -> None:
        super().__init__(**server)
        self._settings = settings
        self._limit = connections
        self._is_admitted = False
        self._active_cycle: RequestResponseCycle | None = None
        """The request that is being handled; `cycle` is the last one that arrived."""
        self._parse_error = NOT_HTTP
        self._head_bytes = 0
        self._body_bytes = 0
        self._unparsed_bytes = 0
        """Bytes that the parser holds: those it got since it last called back."""
        # When each phase began, on the monotonic clock; None outside of the phase.
        self._idle_since: float | None = time.monotonic()
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._unread_since: float | None = None
        self._closing_since: float | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._is_admitted = self._limit.open(self)
        if self._limit.is_exhausted:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.close(self)
        super().connection_lost(exc)
        answering = self._active_cycle
        if answering is not None and not answering.response_complete:
            # uvicorn marks only the last request, and would write to the closed connection.
            answering.disconnected = True
            answering.message_event.set()
        self._unset_keepalive_if_required()

    def evict(self) -> None:
        self.transport.abort()

    def check_timeouts(self, now: float) -> None:
        """Close the connection if one of its timeouts has passed."""
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
            self._send_error(HEAD_TOO_SLOW)
        elif self._body_since is not None and self.flow.read_paused:
            self._body_since = now  # the gateway itself has paused reading
        elif _is_over(self._body_since, self._body_timeout_s, now):
            self._send_error(BODY_TOO_SLOW)
        elif _is_over(self._idle_since, self._idle_timeout_s, now):
            self.transport.close()

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._closing_since is not None:
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > MAX_HEAD_BYTES:
            self._send_error(HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._body_bytes = self._unparsed_bytes = 0
        self._head_since = time.monotonic()
        if self._idle_since is not None:
            self._idle_since = None
            self._limit.mark_waiting(self)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._add_to_head(len(url))
        if len(self.url) > MAX_URL_BYTES:
            self._stop_parsing(URL_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Also called for the trailers of a chunked body."""
        super().on_header(name, value)
        self._add_to_head(len(name) + len(value) + len(": \r\n"))

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        self._head_since, self._body_since = None, time.monotonic()
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self._stop_parsing(TOO_MANY_PIPELINED)

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        self._body_bytes += len(body)
        if self.cycle.response_complete and self._body_bytes > MAX_DISCARDED_BYTES:
            self._stop_parsing(NOT_HTTP)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        self._body_since = None
        super().on_message_complete()
        self._limit.mark_busy(self)
        self._update_idle_since()

    # Sending

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not self._is_admitted and cycle.scope["path"] not in HEALTH_PATHS:
            app = TOO_MANY_CONNECTIONS
        self._active_cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last:
            self._update_idle_since()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_since = None

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser fails."""
        self._send_error(self._parse_error)

    def _send_error(self, error: ErrorResponse) -> None:
        """Send ``error`` unless another response is in the way, and close."""
        if self._closing_since is not None:
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or not cycle.more_body:
                # The error would end up in the middle of a response, or before one.
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or not cycle.response_complete or self._body_since is None:
            self.transport.write(error.as_bytes(self.scope.get("path", "")))
        # If it were closed with unread data, the connection would be reset before the client has
        # read the response. So data is read and dropped until the client closes; for 5 s at most.
        self._closing_since = time.monotonic()
        self.transport.write_eof()
        self.flow.resume_reading()

    def _stop_parsing(self, error: ErrorResponse) -> None:
        self._parse_error = error
        raise StopParsing

    def _add_to_head(self, size: int) -> None:
        self._unparsed_bytes = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._stop_parsing(HEAD_TOO_LARGE)

    def _update_idle_since(self) -> None:
        if self._body_since is None and self.cycle.response_complete:
            if self._head_since is None:  # else the next request has started
                self._idle_since = time.monotonic()
            self._limit.mark_waiting(self)

    @property
    def _body_timeout_s(self) -> float:
        return self._settings.body_timeout_s + self._body_bytes / MIN_BODY_BYTES_PER_S

    @property
    def _idle_timeout_s(self) -> float:
        if self.cycle is None:  # the client has never sent anything
            return self._settings.head_timeout_s
        return self._settings.keep_alive_s


def _is_over(since: float | None, timeout_s: float, now: float) -> bool:
    return since is not None and now - since > timeout_s
