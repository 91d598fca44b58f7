"""What a client reads about a body that cannot be decoded: which field, and what it must be."""

import json
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from services.gateway.validation.decode import decode_body
from services.gateway.validation.wording import MAX_QUOTE_CHARS
from shared.errors import InvalidRequest
from shared.wire.api import JobSubmission


class Circle(Struct, tag_field="shape", tag="circle", forbid_unknown_fields=True):
    radius: float


class Square(Struct, tag_field="shape", tag="square"):
    side: float


class Body(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=5)]
    count: Annotated[int, Meta(ge=0, le=10)] | None = None
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    sizes: Annotated[tuple[int, ...], Meta(min_length=2, max_length=3)] = (1, 2)
    colour: Literal["red", "green"] = "red"
    is_open: bool = False
    shapes: list[Circle | Square] = []
    text: str | list[str] = ""
    extra: dict[str, int] = {}
    biases: Annotated[
        dict[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=-100)]], Meta(max_length=2)
    ] = {}
    within: "Body | None" = None
    nothing: None = None

    def __post_init__(self) -> None:
        if self.count == 7 and self.is_open:
            raise ValueError("count and is_open exclude each other")
        if self.count == 8:
            raise ValueError("`count` applies only to `shapes`; leave it out")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ("{}", "name", "name is missing"),
        ("[]", None, "the body must be an object"),
        ('"x"', None, "the body must be an object"),
        (
            '{"name":"a","colr":1}',
            "colr",
            "colr is not a field of this request; did you mean colour?",
        ),
        (
            '{"name":"a","x":1}',
            "x",
            "x is not a field of this request; the fields are name, count, share, sizes, "
            "colour, is_open, shapes, text, extra, biases, within, nothing",
        ),
        (
            '{"name":"a","shapes":[{"shape":"circle","radius":1,"y":1}]}',
            "shapes[0].y",
            "shapes[0].y is not a field of this request; the fields are shape, radius, side",
        ),
        ('{"name":1}', "name", "name must be a string"),
        ('{"name":null}', "name", "name must be a string"),
        ('{"name":""}', "name", "name must not be empty"),
        ('{"name":"abcdef"}', "name", "name must have at most 5 characters"),
        ('{"name":"a","count":"1"}', "count", "count must be a whole number"),
        ('{"name":"a","count":1.5}', "count", "count must be a whole number"),
        ('{"name":"a","count":-1}', "count", "count must be at least 0"),
        ('{"name":"a","count":11}', "count", "count must be at most 10"),
        ('{"name":"a","share":0}', "share", "share must be more than 0"),
        ('{"name":"a","share":1.0}', "share", "share must be less than 1"),
        ('{"name":"a","share":[]}', "share", "share must be a number"),
        ('{"name":"a","sizes":[1]}', "sizes", "sizes must have at least 2 items"),
        ('{"name":"a","sizes":[1,2,3,4]}', "sizes", "sizes must have at most 3 items"),
        ('{"name":"a","sizes":[1,"2"]}', "sizes[1]", "sizes[1] must be a whole number"),
        ('{"name":"a","sizes":5}', "sizes", "sizes must be an array"),
        ('{"name":"a","colour":"blue"}', "colour", "colour must be green or red, not 'blue'"),
        ('{"name":"a","is_open":1}', "is_open", "is_open must be a boolean"),
        (
            '{"name":"a","shapes":[{"shape":"line"}]}',
            "shapes[0].shape",
            "shapes[0].shape must be circle or square, not 'line'",
        ),
        (
            '{"name":"a","shapes":[{"shape":"circle"}]}',
            "shapes[0].radius",
            "shapes[0].radius is missing",
        ),
        ('{"name":"a","text":5}', "text", "text must be a string or an array"),
        ('{"name":"a","extra":{"k":"v"}}', "extra", "each value of extra must be a whole number"),
        (
            '{"name":"a","biases":{"1":-101}}',
            "biases",
            "each value of biases must be at least -100",
        ),
        ('{"name":"a","biases":{"k":1}}', "biases", "each key of biases must be a whole number"),
        ('{"name":"a","biases":{"-1":1}}', "biases", "each key of biases must be at least 0"),
        (
            '{"name":"a","biases":{"1":1,"2":1,"3":1}}',
            "biases",
            "biases must have at most 2 items",
        ),
        (
            '{"name":"a","count":7,"is_open":true}',
            None,
            "count and is_open exclude each other",
        ),
        ('{"name":"a","count":8}', "count", "`count` applies only to `shapes`; leave it out"),
        (
            '{"name":"a","within":{"name":"b","count":8}}',
            "within.count",
            "within: `count` applies only to `shapes`; leave it out",
        ),
        ('{"name":"a","nothing":5}', "nothing", "nothing is not supported; leave it out"),
        ('{"name":"a"', None, "the body is not JSON: Input data was truncated"),
    ],
)
def test_an_invalid_body_is_explained_in_one_sentence(
    body: str, param: str | None, message: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        decode_body(body.encode(), Body)
    assert (raised.value.param, raised.value.message) == (param, message)


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a", "x" * 10_000: 1},
        {"name": "a", "colour": "x" * 10_000},
    ],
)
def test_what_is_quoted_is_cut(body: dict[str, Any]) -> None:
    """A sentence does not grow with the body."""
    with pytest.raises(InvalidRequest) as raised:
        decode_body(json.dumps(body).encode(), Body)
    assert "x" * MAX_QUOTE_CHARS in raised.value.message
    assert "x" * (MAX_QUOTE_CHARS + 1) not in raised.value.message


def test_a_field_of_several_lines_is_named() -> None:
    """What stands in the body may hold any character."""
    with pytest.raises(InvalidRequest, match="is not a field") as raised:
        decode_body(b'{"name":"a","two\\nlines`":1}', Body)
    assert raised.value.param == "two\nlines`"


def test_the_priorities_of_a_job_are_listed() -> None:
    with pytest.raises(InvalidRequest, match="priority must be high or low or normal"):
        decode_body(b'{"prompt":"x","priority":"urgent"}', JobSubmission)
