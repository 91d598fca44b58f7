"""Tool calls in the syntax of each family."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from shared.answers.marks import PYTHON_TAG, TOOL_CALL, TOOL_CALLS
from shared.wire.tools import FunctionCall, ToolCall

ID_CHARACTERS = 9
"""Of the id of a call: templates of Mistral take no others."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# Some versions write an id after the name.
_MISTRAL_HEAD = re.compile(
    r"\s*\[TOOL_CALLS\]\s*([a-zA-Z0-9_-]{1,64})\s*(?:\[CALL_ID\][^\[]{0,64})?\[ARGS\]\s*"
)


class Call(NamedTuple):
    """``arguments`` is a JSON object."""

    name: str
    arguments: str


def tool_call(call: Call, job_id: str, number: int, choice: int = 0) -> ToolCall:
    """The call with its id: the same one whenever and wherever the answer is read. It is the call
    ``number`` in the answer ``choice``, both counted from 0."""
    answer = f"{job_id}/{choice}" if choice else job_id
    value = int.from_bytes(hashlib.sha256(f"{answer} {number}".encode()).digest())
    digits = (_DIGITS[value // len(_DIGITS) ** place % len(_DIGITS)] for place in range(9))
    return ToolCall("".join(digits), FunctionCall(call.name, call.arguments))


def _json(text: str) -> Any:
    """What ``text`` says in JSON; None if it is something else."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None


def _arguments(value: Any) -> str | None:
    """Arguments of a call as a JSON object; None if they are something else."""
    if isinstance(value, str):
        value = _json(value) if value.strip() else {}
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else None


def arguments_in(text: str) -> str | None:
    """The JSON object that ``text`` is; None if it is something else."""
    return _arguments(_json(text))


def _calls(text: str, *, needs_arguments: bool = False) -> list[Call] | None:
    """The call, or list of calls, in ``text``; None if it is something else."""
    value = _json(text)
    return _calls_in(value if isinstance(value, list) else [value], needs_arguments)


def _calls_in(values: Iterable[Any], needs_arguments: bool = False) -> list[Call] | None:
    calls = []
    for value in values:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return None
        missing: dict[str, Any] | None = None if needs_arguments else {}
        arguments = _arguments(value.get("arguments", value.get("parameters", missing)))
        if arguments is None:
            return None
        calls.append(Call(name, arguments))
    return calls or None


def hermes_calls(text: str) -> list[Call] | None:
    return _calls(text.removeprefix(TOOL_CALL))


def llama_calls(text: str) -> list[Call] | None:
    """One call, or several with semicolons or line breaks between them."""
    text = text.removeprefix(PYTHON_TAG)
    if (calls := _calls(text, needs_arguments=True)) is not None:
        return calls
    for separator in (";", "\n"):
        several: list[Call] = []
        for part in filter(str.strip, text.split(separator)):
            one = _calls(part, needs_arguments=True)
            if one is None:
                break
            several += one
        else:
            return several or None
    return None


def mistral_calls(text: str) -> list[Call] | None:
    return _calls(text.removeprefix(TOOL_CALLS))


def mistral_args_calls(text: str) -> list[Call] | None:
    calls, at = [], 0
    while head := _MISTRAL_HEAD.match(text, at):
        try:
            value, at = json.JSONDecoder().raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return None
        arguments = _arguments(value)
        if arguments is None:
            return None
        calls.append(Call(head[1], arguments))
    return calls if calls and not text[at:].strip() else None
