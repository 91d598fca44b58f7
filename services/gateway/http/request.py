"""Request bodies: read with a bound, decoded strictly, refused with a sentence."""

from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.types import Empty

from services.gateway.validation.wording import refusal
from shared.errors import InvalidRequest, RequestTooLarge

DISCARD_BYTES = 64 * 1024 * 1024
"""How much of a body that is too large is read all the same, so that its sender sees the 413."""

T = TypeVar("T")


class StrictRequest(Request[Any, Any, Any]):
    """Litestar's request, with a decoder that takes no ``"5"`` for a 5."""

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            InvalidRequest: there is none.
            RequestTooLarge: it has more bytes than ``request_max_body_size``.
        """
        if self._body is Empty:
            self._body = await self._read(self.route_handler.resolve_request_max_body_size())
        body: bytes = self._body
        if not body:
            raise InvalidRequest("the body is empty; send a JSON object")
        return body

    async def json(self) -> Any:
        """The body as what the handler's ``data`` is declared to be.

        Raises:
            InvalidRequest: it is not.
        """
        field = self.route_handler.parsed_data_field
        assert field is not None
        return decode_body(await self.body(), field.annotation)

    async def _read(self, limit: int | None) -> bytes:
        parts, size, more = [], 0, True
        while more and size <= DISCARD_BYTES:
            event = await self.receive()
            if event["type"] != "http.request":
                raise InvalidRequest("the client hung up in the middle of its request")
            size += len(event["body"])
            if limit is None or size <= limit:
                parts.append(event["body"])
            more = event.get("more_body", False)
        if limit is not None and size > limit:
            raise RequestTooLarge(f"the body has more than {limit} bytes")
        return b"".join(parts)


def decode_body(body: bytes, kind: type[T]) -> T:
    """``body`` as ``kind``, without any leniency.

    Raises:
        InvalidRequest: with the field's path as ``param``, where one is to blame.
    """
    try:
        body.decode("utf-8")
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except msgspec.ValidationError as error:
        raise refusal(error, kind) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
