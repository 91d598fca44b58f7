"""Items of a conversation: from OpenAI's to the messages of a job, and back."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from services.gateway.http.openai.responses.ids import input_item_id, job_of_output_item
from services.gateway.validation.wording import invalid_body
from shared.errors import InvalidRequest
from shared.wire.requests import ChatMessage, TextPart
from shared.wire.tools import FunctionCall, ToolCall, ToolCallId, ToolName

Item = dict[str, Any]
T = TypeVar("T")

INPUT_PARTS = ["input_text"]
ASSISTANT_PARTS = ["output_text", "refusal", "input_text"]
OUTPUT_PARTS = ["input_text", "output_text"]


class _Head(Struct, frozen=True):
    type: str | None = None
    role: str | None = None
    id: str | None = None


class _Message(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Raw


class _Call(Struct, frozen=True):
    call_id: ToolCallId
    name: ToolName
    arguments: str


class _Output(Struct, frozen=True):
    call_id: ToolCallId
    output: Raw


class _Text(Struct, frozen=True):
    text: str


class _Refusal(Struct, frozen=True):
    refusal: str


class _Reasoning(Struct, frozen=True):
    summary: list[_Text] = []
    content: list[_Text] | None = None


KINDS = ["message", "function_call", "function_call_output", "reasoning", "item_reference"]


def input_items(source: Raw) -> list[Raw]:
    """The items in the field `input`, a text or a list.

    Raises:
        InvalidRequest.
    """
    if is_string(source):
        text = decode_at(source, str, "input")
        message = {"role": "user", "content": text}
        return [Raw(msgspec.json.encode(message))]
    if not is_array(source):
        raise InvalidRequest("input must be a string or an array", "input")
    items = decode_at(source, list[Raw], "input")
    if not items:
        raise InvalidRequest("input must not be empty", "input")
    return items


def referenced_jobs(items: Sequence[Raw]) -> dict[str, str]:
    """The jobs whose output the items refer to, with the parameter that does so first.

    Raises:
        InvalidRequest: an item cannot be read, or refers to nothing that can exist.
    """
    found: dict[str, str] = {}
    for number, source in enumerate(items):
        param = f"input[{number}]"
        head = decode_at(source, _Head, param)
        if _kind(head, param) == "item_reference":
            if head.id is None:
                raise InvalidRequest(f"{param}.id is missing", f"{param}.id")
            job_id = job_of_output_item(head.id)
            if job_id is None:
                raise unknown_item(head.id, param)
            found.setdefault(job_id, f"{param}.id")
    return found


def messages_of(
    items: Sequence[Raw], history: Sequence[ChatMessage], known: Mapping[str, Item]
) -> list[ChatMessage]:
    """The messages that the items say, which follow ``history``. ``known`` are items of earlier
    responses by their ids.

    Raises:
        InvalidRequest: an item is not valid, or of a kind that a text model cannot take.
    """
    turns = _Turns()
    call_ids = {call.id for message in history for call in message.tool_calls or []}
    for number, source in enumerate(items):
        param = f"input[{number}]"
        head = decode_at(source, _Head, param)
        kind = _kind(head, param)
        if kind == "item_reference":
            item = known.get(head.id or "")
            if item is None:
                raise unknown_item(head.id, param)
            kind, source = item["type"], Raw(msgspec.json.encode(item))
        if kind == "message":
            message = decode_at(source, _Message, param)
            turns.say(message.role, _content(message.content, message.role, f"{param}.content"))
        elif kind == "reasoning":
            reasoning = decode_at(source, _Reasoning, param)
            turns.reason("".join(part.text for part in reasoning.content or reasoning.summary))
        elif kind == "function_call":
            call = decode_at(source, _Call, param)
            function = FunctionCall(call.name, call.arguments)
            try:
                _ = function.decoded_arguments
            except (ValueError, RecursionError):
                field = f"{param}.arguments"
                raise InvalidRequest(f"{field}: not a JSON object", field) from None
            call_ids.add(call.call_id)
            turns.call(ToolCall(call.call_id, function))
        else:
            output = decode_at(source, _Output, param)
            if output.call_id not in call_ids:
                field = f"{param}.call_id"
                raise InvalidRequest(
                    f"{field}: no earlier item is a function_call with this call_id", field
                )
            content = _content(output.output, "tool", f"{param}.output")
            turns.answer(output.call_id, content)
    return turns.messages


def output_messages(items: Iterable[Item]) -> list[ChatMessage]:
    """The messages that the items of a response's output say."""
    items = list(items)
    sources = [Raw(msgspec.json.encode(item)) for item in items]
    return messages_of(sources, (), {})


def items_of(messages: Sequence[ChatMessage], job_id: str) -> list[Item]:
    """The items that ``messages`` say, the input of the response that ``job_id`` is."""
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
            parts = content if isinstance(content, list) else [TextPart("text", content or "")]
            text = (
                {"type": "output_text", "annotations": []} if is_answer else {"type": "input_text"}
            )
            add(
                "message",
                role=message.role,
                content=[{**text, "text": part.text} for part in parts],
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


def is_string(source: Raw) -> bool:
    return bytes(memoryview(source)[:1]) == b'"'


def is_array(source: Raw) -> bool:
    return bytes(memoryview(source)[:1]) == b"["


def is_given(source: Raw | UnsetType) -> TypeGuard[Raw]:
    """Whether a field that is not decoded has a value."""
    return source is not UNSET and bytes(memoryview(source)[:4]) != b"null"


def decode_at(source: Raw | bytes, kind: type[T], param: str) -> T:
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
    except msgspec.DecodeError as error:  # the body was read as far as its brackets
        raise InvalidRequest(f"{param}: not JSON: {error}", param) from None
    except RecursionError:
        raise InvalidRequest(f"{param}: nested too deeply", param) from None


def check_kind(source: Raw, param: str, known: list[str]) -> str:
    """The ``type`` of an object, which must be one of ``known``.

    Raises:
        InvalidRequest.
    """
    return _checked(decode_at(source, _Head, param).type, param, known)


def unknown_item(item_id: str | None, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param}.id: no kept response has an output item {(item_id or '')[:80]!r}; send the item "
        "itself",
        f"{param}.id",
    )


class _Turns:
    """Makes messages of items: what an assistant reasons, says and calls in a row is one."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._is_open = False
        """Whether the last message is an assistant's that may go on."""

    def say(self, role: str, content: str | list[TextPart]) -> None:
        last = self._last
        if role == "assistant" and last is not None and not (last.text or last.tool_calls):
            self._replace(content=content)
            return
        real: Any = "system" if role == "developer" else role
        self.messages.append(ChatMessage(real, content))
        self._is_open = role == "assistant"

    def reason(self, text: str) -> None:
        last = self._last
        if last is None or last.text or last.tool_calls:
            self._open()
            self._replace(reasoning_content=text)
        else:
            self._replace(reasoning_content=(last.reasoning_content or "") + text)

    def call(self, call: ToolCall) -> None:
        last = self._last or self._open()
        self._replace(tool_calls=[*(last.tool_calls or []), call])

    def answer(self, call_id: str, content: str | list[TextPart]) -> None:
        self.messages.append(ChatMessage("tool", content, tool_call_id=call_id))
        self._is_open = False

    @property
    def _last(self) -> ChatMessage | None:
        return self.messages[-1] if self._is_open else None

    def _open(self) -> ChatMessage:
        self.messages.append(ChatMessage("assistant", ""))
        self._is_open = True
        return self.messages[-1]

    def _replace(self, **fields: Any) -> None:
        self.messages[-1] = msgspec.structs.replace(self.messages[-1], **fields)


def _kind(head: _Head, param: str) -> str:
    kind = head.type
    if kind is None:
        # Both may leave it out.
        kind = "item_reference" if head.role is None and head.id is not None else "message"
    return _checked(kind, param, KINDS)


def _checked(kind: str | None, param: str, known: list[str]) -> str:
    if kind not in known:
        what = "is missing" if kind is None else f"{kind[:80]!r} is not supported"
        raise InvalidRequest(f"{param}.type: {what}; use {' or '.join(known)}", f"{param}.type")
    return kind


def _content(source: Raw, role: str, param: str) -> str | list[TextPart]:
    if is_string(source):
        return decode_at(source, str, param)
    if not is_array(source):
        raise InvalidRequest(f"{param} must be a string or an array", param)
    known = {"assistant": ASSISTANT_PARTS, "tool": OUTPUT_PARTS}.get(role, INPUT_PARTS)
    texts = []
    for number, part in enumerate(decode_at(source, list[Raw], param)):
        at = f"{param}[{number}]"
        if check_kind(part, at, known) == "refusal":
            texts.append(decode_at(part, _Refusal, at).refusal)
        else:
            texts.append(decode_at(part, _Text, at).text)
    if len(texts) == 1:
        return texts[0]
    return [TextPart("text", text) for text in texts]
