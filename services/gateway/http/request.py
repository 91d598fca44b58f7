"""Reads and decodes the body of a request, up to a maximum size."""

from typing import Any

from litestar import Request
from litestar.types import Empty

from services.gateway.http.openai.parameters import Body
from services.gateway.validation.decode import decode_body
from services.gateway.validation.wording import MAX_QUOTE_CHARS
from shared.errors import InvalidRequest, RequestTooLarge

DISCARD_BYTES = 64 * 1024 * 1024
"""How much of a body that is too large is read and dropped, so that the client sees the 413."""

WITHOUT_EFFECT = ("beta",)
"""Parameters of URLs that need not be refused: `beta` resources of OpenAI's client add this one."""


class StrictRequest(Request[Any, Any, Any]):
    """Litestar's request with strict decoding: ``"5"`` is not a number."""

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            InvalidRequest: it is empty or compressed.
            RequestTooLarge: it has more than ``request_max_body_size`` bytes.
        """
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise InvalidRequest(
                f"Content-Encoding: {encoding[:MAX_QUOTE_CHARS]} is not supported; send the body "
                "uncompressed",
                "Content-Encoding",
            )
        if self._body is Empty:
            self._body = await self._read(self.route_handler.resolve_request_max_body_size())
        body: bytes = self._body
        if not body:
            raise InvalidRequest("the body is empty; send a JSON object")
        return body

    async def json(self) -> Any:
        """The body as the declared type of the handler's ``data``.

        Raises:
            InvalidRequest: it is not valid, or the URL has parameters, which would be ignored.
        """
        for name in self.query_params:
            if name not in WITHOUT_EFFECT:
                name = name[:MAX_QUOTE_CHARS]
                raise InvalidRequest(f"{name}: parameters belong in the body, not in the URL", name)
        field = self.route_handler.parsed_data_field
        assert field is not None
        body, kind = await self.body(), field.annotation
        if field.is_subclass_of(Body):
            kind.check_names(body)
        return decode_body(body, kind)

    async def _read(self, limit: int | None) -> bytes:
        parts, size, more = [], 0, True
        while more and size <= DISCARD_BYTES:
            event = await self.receive()
            if event["type"] != "http.request":
                raise InvalidRequest("the client disconnected in the middle of its request")
            size += len(event["body"])
            if limit is None or size <= limit:
                parts.append(event["body"])
            more = event.get("more_body", False)
        if limit is not None and size > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes")
        return b"".join(parts)
