"""What a gateway refuses before an inferer sees it, in milliseconds."""

from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from services.gateway.validation.limits import (
    MAX_METADATA_BYTES,
    check_metadata,
    check_submission,
    clamped,
)
from services.gateway.validation.schema_size import read_schema
from shared.errors import InvalidRequest
from shared.wire.api import Submission
from shared.wire.inferers import ModelFacts
from shared.wire.requests import NamedSchema, RegexFormat


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


FACTS = ModelFacts(
    n_ctx=100_000,
    tasks=["chat", "complete"],
    vocabulary=1000,
    max_choices=8,
    accepts=["grammars", "prompt_tokens"],
)


@pytest.mark.parametrize(
    ("body", "facts", "param", "why"),
    [
        ({"prompt": "x", "n": 2}, FACTS, "n", "set max_tokens to 50000 or less"),
        (
            {"prompt": "x", "n": 8, "max_tokens": 12_501},
            FACTS,
            "n",
            "set max_tokens to 12500 or less",
        ),
        (
            {"prompt": "x", "n": 2, "max_tokens": 5},
            replace(FACTS, max_choices=1),
            "n",
            "earlier version",
        ),
        (
            {"prompt": "x", "n": 4, "max_tokens": 1_000, "logprobs": True, "top_logprobs": 3},
            FACTS,
            "logprobs",
            "with top_logprobs 3 and n 4 an answer has at most 750 tokens",
        ),
        ({"n": 2, "input": "x"}, FACTS, "n", "applies only to text"),
        (
            {"prompt": "x", "response_format": RegexFormat("a")},
            replace(FACTS, accepts=[]),
            "response_format",
            "earlier version",
        ),
        (
            {"prompt": "x", "response_format": RegexFormat("a"), "ignore_eos": True},
            FACTS,
            "ignore_eos",
            "determines where the answer ends",
        ),
        ({"prompt_tokens": [1]}, replace(FACTS, accepts=[]), "prompt_tokens", "earlier version"),
        ({"prompt_tokens": [5, 1000]}, FACTS, "prompt_tokens", "1000 is not a token"),
        ({"prompt_tokens": [5] * 100_000}, FACTS, "prompt_tokens", "leave no room"),
    ],
    ids=str,
)
def test_answers_that_cannot_be_are_refused(
    body: dict[str, Any], facts: ModelFacts, param: str, why: str
) -> None:
    """By the name of the field, and with what is possible."""
    with pytest.raises((InvalidRequest, ValueError), match=why) as refused:
        check_submission(Submission(**body), facts)
    if isinstance(refused.value, InvalidRequest):
        assert refused.value.param == param


def test_answers_that_fit_are_accepted() -> None:
    check_submission(Submission(prompt="x", max_tokens=12_500, n=8), FACTS)
    check_submission(Submission(prompt="x", n=8), None)
    check_submission(Submission(prompt="x"), FACTS)
    check_submission(Submission(prompt_tokens=[999], response_format=RegexFormat("a")), FACTS)


def test_more_tokens_than_the_context_has_are_clamped() -> None:
    wanted = Submission(prompt="x", max_tokens=200_000)
    assert clamped(wanted, FACTS).max_tokens == 100_000
    assert clamped(wanted, None) == wanted
    assert clamped(Submission(prompt="x"), FACTS).max_tokens is None


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
