"""Error responses that are sent without the framework."""

from dataclasses import dataclass
from http import HTTPStatus

from litestar.types import Receive, Scope, Send

from services.gateway.http.errors import error_body
from shared.wire.codecs import encode


@dataclass(frozen=True)
class ErrorResponse:
    """An error in the form of the API that the path belongs to. It closes the connection."""

    status: int
    code: str
    detail: str
    retry_after_s: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application."""
        headers, body = self._parts(scope["path"])
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def as_bytes(self, path: str) -> bytes:
        """As a whole HTTP/1.1 response."""
        headers, body = self._parts(path)
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        phrase = HTTPStatus(self.status).phrase.encode()
        return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (self.status, phrase, lines, body)

    def _parts(self, path: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
        error, media_type = error_body(path, self.status, self.code, self.detail)
        body = encode(error)
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        return headers, body
