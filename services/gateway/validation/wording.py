"""Turns msgspec's validation errors into messages for clients."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from msgspec import ValidationError, inspect

from shared.errors import InvalidRequest

MAX_QUOTE_CHARS = 80
CLOSE = 0.75
"""The similarity, from 0 to 1, from which on a name is suggested instead of another."""

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "a boolean",
    "str": "a string",
    "array": "an array",
    "object": "an object",
}
BOUNDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}

_ERROR = re.compile(r"(.*?)(?: - at (`key` in )?`\$\.?([^`]*)`)?", re.DOTALL)
_ANY_VALUE = "[...]"
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_VALUE = re.compile(r"Invalid (?:enum )?value (?:'(.*)'|(True|False))", re.DOTALL)
_ABOUT = re.compile(r"`(\w+)` ")
"""How messages of our own types begin that are about one field."""
_TYPE = re.compile(r"Expected `([a-z |]+)`(?:, got `\w+`)?")
_BOUND = re.compile(r"Expected `(\w+)` (of length )?([<>]=?) (-?\d+)(?:\.0)?")


def invalid_body(error: ValidationError, kind: Any) -> InvalidRequest:
    """The error for a body that could not be decoded as ``kind``."""
    parsed = _ERROR.fullmatch(str(error))
    assert parsed is not None
    message, param = parsed[1], parsed[3] or ""
    subject = f"each key of {param}" if parsed[2] else param or "the body"
    if param.endswith(_ANY_VALUE):
        param = param.removesuffix(_ANY_VALUE)
        subject = f"each value of {param}"
    if match := _FIELD.fullmatch(message):
        param = f"{param}.{match[2]}".lstrip(".")[:MAX_QUOTE_CHARS]
        if match[1] == "missing required":
            return InvalidRequest(f"{param} is missing", param)
        parent = re.findall(r"\w+", parsed[3] or "")
        return unknown_field(param, match[2], _fields(inspect.type_info(kind), parent))
    requirement = None
    if match := _VALUE.fullmatch(message):
        choices = " or ".join(_choices(inspect.type_info(kind), re.findall(r"\w+", param)))
        value = match[2].lower() if match[2] else repr(match[1][:MAX_QUOTE_CHARS])
        requirement = f"be {choices}, not {value}"
    elif match := _TYPE.fullmatch(message):
        if match[1] == "null":
            return InvalidRequest(f"{param} is not supported; leave it out", param)
        requirement = "be " + " or ".join(
            TYPES[name] for name in match[1].split(" | ") if name in TYPES
        )
    elif match := _BOUND.fullmatch(message):
        bound = f"{BOUNDS[match[3]]} {match[4]}"
        if not match[2]:
            requirement = f"be {bound}"
        elif bound == "at least 1":
            requirement = "not be empty"
        else:
            requirement = f"have {bound} {'characters' if match[1] == 'str' else 'items'}"
    if requirement is None:  # a message of our own types
        if match := _ABOUT.match(message):
            named = f"{param}.{match[1]}".lstrip(".")
            return InvalidRequest(f"{param}: {message}" if param else message, named)
        return InvalidRequest(f"{param}: {message}" if param else message, param or None)
    return InvalidRequest(f"{subject} must {requirement}", param or None)


def invalid_parameter(name: str, message: str) -> InvalidRequest:
    """The error for a parameter of a URL, for which the framework has the ``message``."""
    return invalid_body(ValidationError(f"{message} - at `$.{name}`"), dict)


def unknown_field(param: str, name: str, known: Sequence[str]) -> InvalidRequest:
    """The error for a field ``param`` whose ``name`` is not one of those ``known``."""
    param = param[:MAX_QUOTE_CHARS]
    nearest = get_close_matches(name[:MAX_QUOTE_CHARS], known, 1, CLOSE)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the fields are {', '.join(known)}"
    return InvalidRequest(f"{param} is not a field of this request; {hint}", param)


def _fields(kind: inspect.Type, path: list[str]) -> list[str]:
    """The fields of the objects at ``path`` in ``kind``."""
    match kind:
        case inspect.Metadata():
            return _fields(kind.type, path)
        case inspect.UnionType():
            found = [name for member in kind.types for name in _fields(member, path)]
            return list(dict.fromkeys(found))
        case inspect.ListType() if path:
            return _fields(kind.item_type, path[1:])
        case inspect.StructType() if not path:
            tags = [kind.tag_field] if kind.tag_field else []
            return [*tags, *(field.encode_name for field in kind.fields)]
        case inspect.StructType():
            types = [field.type for field in kind.fields if field.encode_name == path[0]]
            return _fields(types[0], path[1:]) if types else []
    return []


def _choices(kind: inspect.Type, path: list[str]) -> Iterator[str]:
    """The allowed values at ``path`` in ``kind``, if they are an enumeration."""
    match kind:
        case inspect.Metadata():
            yield from _choices(kind.type, path)
        case inspect.UnionType():
            for member in kind.types:
                yield from _choices(member, path)
        case inspect.ListType() if path:
            yield from _choices(kind.item_type, path[1:])
        case inspect.StructType() if path == [kind.tag_field]:
            yield str(kind.tag)
        case inspect.StructType():
            for field in kind.fields:
                if path[:1] == [field.encode_name]:
                    yield from _choices(field.type, path[1:])
        case inspect.LiteralType() if not path:
            for value in kind.values:
                yield str(value).lower() if isinstance(value, bool) else str(value)
