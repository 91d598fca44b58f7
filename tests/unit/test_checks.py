"""What a gateway refuses before an inferer sees it, in milliseconds."""

import pytest
from msgspec import Raw

from services.gateway.validation.limits import (
    MAX_METADATA_BYTES,
    check_metadata,
)
from services.gateway.validation.schema_size import read_schema
from shared.errors import InvalidRequest
from shared.wire.requests import NamedSchema


@pytest.mark.parametrize(
    "source",
    [
        *(
            b"5",
            b"null",
            b"[]",
            b'{"const": "\\ud800"}',
            b'{"const": [%b]}' % (b"[]," * 500_000 + b"[]"),
        ),
        *(b'{"const": ' + b"[" * depth + b"]" * depth + b"}" for depth in (70, 5000)),
        b'{"type": "string"' + b" " * 1_000_000 + b"}",
    ],
    ids=lambda source: str(source[:30]),
)
def test_a_schema_is_a_small_object(source: bytes) -> None:
    """Whatever else it is, it is refused before it takes memory."""
    with pytest.raises(InvalidRequest) as refused:
        read_schema(Raw(source), lambda: NamedSchema(Raw(source)).schema, "response_format")
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"5", b'"x"', b"[]", b'{"a": "\\ud800"}', b'{"a": "%s"}' % (b"x" * 20_000)),
        *(b'{"a": ' + b"[" * depth + b"]" * depth + b"}" for depth in (70, 5000)),
    ],
    ids=lambda metadata: str(metadata[:20]),
)
def test_metadata_is_a_small_object(metadata: bytes) -> None:
    """Refused by the name of its field."""
    with pytest.raises(InvalidRequest) as refused:
        check_metadata(Raw(metadata))
    assert refused.value.param == "metadata"


def test_metadata_may_have_any_content_that_fits() -> None:
    """Null means none, and 16 kB are enough for everybody."""
    for metadata in (b"null", b"{}", b'{"a": [1, {"b": null}], "c": "\xc3\xbc"}'):
        check_metadata(Raw(metadata))
    check_metadata(Raw(b'{"a": "%s"}' % (b"x" * (MAX_METADATA_BYTES - 9))))
