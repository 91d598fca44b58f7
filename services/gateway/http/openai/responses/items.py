"""Converts the items of a conversation to the messages of a job, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from services.gateway.http.openai.responses.ids import input_item_id, job_of_output_item
from services.gateway.http.openai.responses.input_types import (
    AnswerItem,
    AnyItem,
    CallItem,
    CallOutputItem,
    InputText,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
)
from services.gateway.validation.wording import invalid_body
from shared.errors import InvalidRequest
from shared.wire.requests import ChatMessage, TextPart
from shared.wire.tools import FunctionCall, ToolCall

Item = dict[str, Any]
T = TypeVar("T")
MAX_REFERENCED_JOBS = 256
"""By the items of one input; each is read from the broker."""


class _Head(Struct, frozen=True):
    type: str | None = None
    role: str | None = None
    id: str | None = None


KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def input_items(given: str | list[Raw]) -> list[Raw]:
    """The items in the field `input`."""
    if isinstance(given, str):
        return [Raw(msgspec.json.encode({"role": "user", "content": given}))]
    return given


def referenced_jobs(items: Sequence[Raw]) -> dict[str, str]:
    """The jobs whose output the items refer to, with the parameter that does so first.

    Raises:
        InvalidRequest: an item cannot be read, or refers to nothing that can exist; or they refer
            to one twice, or to more than `MAX_REFERENCED_JOBS`. A reference is much shorter than
            what it may stand for.
    """
    item_ids: set[str] = set()
    jobs: dict[str, str] = {}
    for number, source in enumerate(items):
        param = f"input[{number}]"
        head = _decode_at(source, _Head, param)
        if _kind(head, param) != "item_reference":
            continue
        _decode_at(source, AnyItem, param)
        if head.id is None:
            raise InvalidRequest(f"{param}.id is missing", f"{param}.id")
        job_id = job_of_output_item(head.id)
        if job_id is None:
            raise _unknown_item(head.id, param)
        if head.id in item_ids:
            raise InvalidRequest(f"{param}.id: an earlier item refers to the same", f"{param}.id")
        item_ids.add(head.id)
        jobs.setdefault(job_id, f"{param}.id")
    if len(jobs) > MAX_REFERENCED_JOBS:
        raise InvalidRequest(
            f"input: it refers to items of {len(jobs)} responses, more than "
            f"{MAX_REFERENCED_JOBS}; send the items themselves",
            "input",
        )
    return jobs


def messages_of(
    items: Sequence[Raw], history: Sequence[ChatMessage], known: Mapping[str, Item]
) -> list[ChatMessage]:
    """The messages for ``items``, which follow ``history``. ``known`` maps ids to items of earlier
    responses.

    Raises:
        InvalidRequest: an item is not valid, or of a kind that a text model cannot take.
    """
    turns = _Turns()
    call_ids = {call.id for message in history for call in message.tool_calls or []}
    for number, source in enumerate(items):
        param = f"input[{number}]"
        head = _decode_at(source, _Head, param)
        kind = _kind(head, param)
        if kind == "item_reference":
            item = known.get(head.id or "")
            if item is None:
                raise _unknown_item(head.id, param)
            source = Raw(msgspec.json.encode(item))
            head = _decode_at(source, _Head, param)
            kind = _kind(head, param)
        if kind == "message" and head.role == "assistant":
            answer = _decode_at(source, AnswerItem, param)
            turns.say(answer.role, _content(answer.content))
        elif kind == "message":
            message = _decode_at(source, MessageItem, param)
            turns.say(message.role, _content(message.content))
        elif kind == "reasoning":
            reasoning = _decode_at(source, ReasoningItem, param)
            turns.reason("".join(part.text for part in reasoning.content or reasoning.summary))
        elif kind == "function_call":
            call = _decode_at(source, CallItem, param)
            if not _is_object(call.arguments):
                at = f"{param}.arguments"
                raise InvalidRequest(f"{at}: not a JSON object", at)
            call_ids.add(call.call_id)
            turns.call(ToolCall(call.call_id, FunctionCall(call.name, call.arguments)))
        else:
            output = _decode_at(source, CallOutputItem, param)
            if output.call_id not in call_ids:
                at = f"{param}.call_id"
                raise InvalidRequest(
                    f"{at}: no earlier item is a function_call with this call_id", at
                )
            turns.answer(output.call_id, _content(output.output))
    return turns.messages


def output_messages(items: Iterable[Item]) -> list[ChatMessage]:
    """The messages for the items of a response's output."""
    items = list(items)
    sources = [Raw(msgspec.json.encode(item)) for item in items]
    return messages_of(sources, (), {})


def items_of(messages: Sequence[ChatMessage], job_id: str) -> list[Item]:
    """The items for ``messages``, which are the input of the response ``job_id``."""
    found: list[Item] = []

    def add(kind: str, **fields: Any) -> None:
        item_id = input_item_id(kind, job_id, len(found))
        found.append({"id": item_id, "type": kind, **fields, "status": "completed"})

    for message in messages:
        if message.role == "tool":
            add("function_call_output", call_id=message.tool_call_id, output=message.text)
            continue
        if message.reasoning_content:
            part = {"type": "reasoning_text", "text": message.reasoning_content}
            add("reasoning", summary=[], content=[part])
        is_answer = message.role == "assistant"
        if message.text or not (is_answer and (message.tool_calls or message.reasoning_content)):
            content = message.content
            if content is None or isinstance(content, str):
                content = [TextPart("text", content or "")]
            text = (
                {"type": "output_text", "annotations": []} if is_answer else {"type": "input_text"}
            )
            add(
                "message",
                role=message.role,
                content=[{**text, "text": part.text} for part in content],
            )
        for call in message.tool_calls or []:
            function = call.function
            add(
                "function_call",
                call_id=call.id,
                name=function.name,
                arguments=function.arguments,
            )
    return found


def _decode_at(source: Raw | bytes, kind: type[T], param: str) -> T:
    """``source`` as ``kind``; errors name it ``param``.

    Raises:
        InvalidRequest.
    """
    try:
        return msgspec.json.decode(source, type=kind)
    except msgspec.ValidationError as error:
        wrong = invalid_body(error, kind)
        message = wrong.message
        if wrong.param is None:
            message = message.removeprefix("the body ")
            raise InvalidRequest(f"{param} {message}", param) from None
        separator = "" if wrong.param.startswith("[") else "."
        raise InvalidRequest(
            f"{param}{separator}{message}", f"{param}{separator}{wrong.param}"
        ) from None
    except msgspec.DecodeError as error:  # only the brackets of the body were checked
        raise InvalidRequest(f"{param}: not JSON: {error}", param) from None
    except RecursionError:
        raise InvalidRequest(f"{param}: nested too deeply", param) from None


def _unknown_item(item_id: str | None, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}.id: no stored response has an output item {(item_id or '')[:80]!r}; send the "
        "item itself",
        f"{param}.id",
    )


@dataclass
class _Turn:
    """What an assistant reasons, says and calls in a row."""

    reasoning: list[str] = field(default_factory=list)
    content: str | list[TextPart] = ""
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def message(self) -> ChatMessage:
        reasoning = "".join(self.reasoning) or None
        calls = self.calls or None
        return ChatMessage("assistant", self.content, tool_calls=calls, reasoning_content=reasoning)


class _Turns:
    """Makes messages of items: each turn of an assistant is one."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._turn: _Turn | None = None
        """The one that may go on."""

    def say(self, role: str, content: str | list[TextPart]) -> None:
        if role == "assistant":
            self._turn_before_calls().content = content
        else:
            real: Any = "system" if role == "developer" else role
            self._add(ChatMessage(real, content))

    def reason(self, text: str) -> None:
        self._turn_before_calls().reasoning.append(text)

    def call(self, call: ToolCall) -> None:
        if self._turn is None:
            self._turn = _Turn()
        self._turn.calls.append(call)

    def answer(self, call_id: str, content: str | list[TextPart]) -> None:
        self._add(ChatMessage("tool", content, tool_call_id=call_id))

    @property
    def messages(self) -> list[ChatMessage]:
        return self._messages + ([self._turn.message] if self._turn else [])

    def _turn_before_calls(self) -> _Turn:
        """The turn that goes on, if it has said and called nothing yet, or a new one."""
        if self._turn is None or self._turn.content or self._turn.calls:
            self._end_turn()
            self._turn = _Turn()
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn.message)
        self._turn = None

    def _add(self, message: ChatMessage) -> None:
        self._end_turn()
        self._messages.append(message)


def _kind(head: _Head, param: str) -> str:
    """Raises: InvalidRequest: it is of a kind that a text model cannot take."""
    kind = head.type
    if kind is None:
        # OpenAI's API allows both kinds without a type.
        kind = "item_reference" if head.role is None and head.id is not None else "message"
    if kind not in KINDS:
        raise InvalidRequest(
            f"{param}.type: {kind[:80]!r} is not supported; use {' or '.join(KINDS)}",
            f"{param}.type",
        )
    return kind


def _is_object(arguments: str) -> bool:
    """Whether the arguments of a call are a JSON object, which is not decoded."""
    try:
        msgspec.json.decode(arguments.strip() or "{}", type=dict[str, Raw])
    except (ValueError, RecursionError):
        return False
    return True


def _content(content: str | Sequence[InputText | OutputText | Refusal]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    texts = [part.text for part in content]
    return texts[0] if len(texts) == 1 else [TextPart("text", text) for text in texts]
