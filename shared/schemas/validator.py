"""Checks a JSON schema, and answers under it, as the specification of JSON Schema says."""

import json
from decimal import Decimal, InvalidOperation
from typing import Any

import jsonschema_rs
from jsonschema_rs import FancyRegexOptions, ValidationError

PATTERN_OPTIONS = FancyRegexOptions(size_limit=1024 * 1024)
"""Limits the size of a compiled ``pattern``, and with it the time to compile it."""

MAX_REASON_CHARS = 200
"""A reason quotes what is invalid."""

MAX_DIGITS = 4000
"""Python converts no longer ones to an integer."""

MAX_EXPONENT = 4000
"""What is written with more as `1e4001` would have as many digits."""


class OutOfRange(ValueError):
    """A number that nothing can compute with."""

    def __init__(self) -> None:
        super().__init__("a number in it is out of range")


def read_json(text: str | bytes) -> Any:
    """``text`` with exact numbers: as a double, 19.99 is not a multiple of 0.01.

    Raises:
        ValueError, RecursionError: it is not JSON, or is nested too deeply.
    """
    return json.loads(text, parse_float=_decimal, parse_int=_integer, parse_constant=_refuse)


def validator_of(schema: Any) -> Any:
    """What validates answers under ``schema``, as `read_json` reads both.

    Raises:
        ValueError: it is not a valid schema.
    """
    try:
        return jsonschema_rs.validator_for(
            schema, validate_formats=True, offline=True, pattern_options=PATTERN_OPTIONS
        )
    except ValidationError as error:
        raise ValueError(f"this is not a valid JSON schema: {_reason(error)}") from None


def answer_error(validator: Any, answer: str) -> str | None:
    """Why ``answer`` is not valid; None if it is."""
    try:
        validator.validate(read_json(answer))
    except ValidationError as error:
        return f"it is not valid under the schema: {_reason(error)}"
    except OutOfRange as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    return None


def _reason(error: ValidationError) -> str:
    reason = error.message
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "…"
    path = "".join(f"/{part}" for part in error.instance_path)[:MAX_REASON_CHARS]
    return f"{reason} (at {path})" if path else reason


def _decimal(digits: str) -> Decimal:
    try:
        number = Decimal(digits)
    except InvalidOperation:
        raise OutOfRange from None
    if abs(number.adjusted()) > MAX_EXPONENT and number:
        raise OutOfRange
    return number


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < MAX_DIGITS else Decimal(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
