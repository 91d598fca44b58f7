"""Request bodies: decoded strictly, refused with a sentence."""

from typing import TypeVar

import msgspec

from services.gateway.validation.wording import refusal
from shared.errors import InvalidRequest

T = TypeVar("T")


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
