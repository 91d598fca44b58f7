"""What is wrong with a body, in words for its sender instead of msgspec's."""

import re
from collections.abc import Iterator
from typing import Any

from msgspec import ValidationError, inspect

from shared.errors import InvalidRequest

LONGEST_QUOTE = 80

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "a boolean",
    "str": "a string",
    "array": "an array",
    "object": "an object",
}
BOUNDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}

_ERROR = re.compile(r"(.*?)(?: - at `\$\.?([^`]*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_VALUE = re.compile(r"Invalid (?:enum )?value '(.*)'", re.DOTALL)
_TYPE = re.compile(r"Expected `([a-z |]+)`(?:, got `\w+`)?")
_BOUND = re.compile(r"Expected `(\w+)` (of length )?([<>]=?) (\d+)(?:\.0)?")


def refusal(error: ValidationError, kind: Any) -> InvalidRequest:
    """The error for a body that is not a valid ``kind``."""
    parsed = _ERROR.fullmatch(str(error))
    assert parsed is not None
    said, param = parsed[1], parsed[2] or ""
    if match := _FIELD.fullmatch(said):
        param = f"{param}.{match[2]}".lstrip(".")[:LONGEST_QUOTE]
        if match[1] == "missing required":
            return InvalidRequest(f"{param} is missing", param)
        fields = ", ".join(kind.__struct_fields__)
        return InvalidRequest(
            f"{param} is not a field of this request; the fields are {fields}", param
        )
    must = None
    if match := _VALUE.fullmatch(said):
        choices = " or ".join(_choices(inspect.type_info(kind), re.findall(r"\w+", param)))
        must = f"be {choices}, not {match[1][:LONGEST_QUOTE]!r}"
    elif match := _TYPE.fullmatch(said):
        must = "be " + " or ".join(TYPES[name] for name in match[1].split(" | ") if name in TYPES)
    elif match := _BOUND.fullmatch(said):
        bound = f"{BOUNDS[match[3]]} {match[4]}"
        if not match[2]:
            must = f"be {bound}"
        elif bound == "at least 1":
            must = "not be empty"
        else:
            must = f"have {bound} {'items' if match[1] == 'array' else 'characters'}"
    if must is None:  # our own words, where fields do not go together
        return InvalidRequest(f"{param}: {said}" if param else said, param or None)
    return InvalidRequest(f"{param or 'the body'} must {must}", param or None)


def _choices(kind: inspect.Type, path: list[str]) -> Iterator[str]:
    """What may stand at ``path`` in a ``kind``, where only certain words may."""
    match kind:
        case inspect.Metadata():
            yield from _choices(kind.type, path)
        case inspect.UnionType():
            for one in kind.types:
                yield from _choices(one, path)
        case inspect.ListType() if path:
            yield from _choices(kind.item_type, path[1:])
        case inspect.StructType() if path == [kind.tag_field]:
            yield str(kind.tag)
        case inspect.StructType():
            for field in kind.fields:
                if path[:1] == [field.encode_name]:
                    yield from _choices(field.type, path[1:])
        case inspect.LiteralType() if not path:
            yield from map(str, kind.values)
