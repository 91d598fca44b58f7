"""Makes a response's output, item by item, and its events from the text that the model writes.

Both depend only on the text, not on the pieces in which it arrives. So an event has the same number
at every gateway, whether it is made while the job runs, from its stored events, or from its result.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from services.gateway.http.openai.answers import TextOffsets, openai_logprob
from services.gateway.http.openai.responses.ids import output_item_id
from shared.answers.calls import Call, tool_call
from shared.answers.reader import AnswerReader, Content, Part, Reasoning
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.logprobs import TokenLogprob
from shared.wire.results import Completed

DELTA_CHARS = 8
"""The length of the text in an event, about two tokens. The rest is sent when its item ends."""

Event = tuple[str, dict[str, Any]]
"""The type of an event, and its fields except for the number."""


def output_of(result: Completed) -> list[dict[str, Any]]:
    """The output items of a completed job."""
    read = Output(result.id, result.format or PLAIN)
    for _ in read.add(result.text, result.logprobs or ()):
        pass
    for _ in read.finish(is_whole=result.finish_reason != "length"):
        pass
    return read.items


class Output:
    """Reads the answer of one job."""

    def __init__(self, job_id: str, format: AnswerFormat) -> None:
        self._job_id = job_id
        self._reader = AnswerReader(format)
        self._tokens = _Tokens()
        self._open: _Text | None = None
        self._calls = 0
        self.items: list[dict[str, Any]] = []
        """The items so far. The last one may be incomplete."""

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[Event]:
        """The events for the next ``text``. ``logprobs`` are those of its tokens."""
        for piece, known in self._tokens.of(text, logprobs):
            parts = self._reader.add(piece)
            if known is not None:
                self._tokens.wait(known)
            yield from self._events(parts)

    def finish(self, *, is_whole: bool) -> Iterator[Event]:
        """The last events. ``is_whole`` is False if the answer was cut off."""
        yield from self._events(self._reader.finish())
        if not self.items:
            yield from self._text_item("message")  # clients expect one, even if it is empty
        yield from self._close("completed" if is_whole else "incomplete")

    def _events(self, parts: list[Part]) -> Iterator[Event]:
        for part in parts:
            match part:
                case Reasoning(text):
                    yield from self._text_item("reasoning")
                    self._tokens.drop()
                case Content(text):
                    yield from self._text_item("message")
                    assert self._open is not None
                    self._open.waiting.extend(self._tokens.take(len(self._open.text)))
                case Call():
                    yield from self._close("completed")
                    self._tokens.drop()
                    yield from self._call(part)
                    continue
            assert self._open is not None
            yield from self._open.add(text)

    def _text_item(self, kind: str) -> Iterator[Event]:
        """Begin an item of this kind, unless the open item already has it."""
        if self._open is not None and self._open.item["type"] == kind:
            return
        yield from self._close("completed")
        index = len(self.items)
        self._open = _Text(kind, output_item_id(kind, self._job_id, index), index)
        self.items.append(self._open.item)
        yield from self._open.begin()

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end(status)
        self._open = None

    def _call(self, call: Call) -> Iterator[Event]:
        known = tool_call(call, self._job_id, self._calls)
        self._calls += 1
        index = len(self.items)
        item = {
            "id": output_item_id("function_call", self._job_id, index),
            "type": "function_call",
            "status": "completed",
            "call_id": known.id,
            "name": call.name,
            "arguments": call.arguments,
        }
        self.items.append(item)
        where = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", {**where, "delta": call.arguments}
        done = {**where, "name": call.name, "arguments": call.arguments}
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {"output_index": index, "item": item}


class _Text:
    """An item with a text: a message, or reasoning."""

    def __init__(self, kind: str, item_id: str, index: int) -> None:
        self._is_message = kind == "message"
        self._event = "response.output_text" if self._is_message else "response.reasoning_text"
        self._index = index
        self._where = {"item_id": item_id, "output_index": index, "content_index": 0}
        self._sent = 0
        self._logprobs: list[dict[str, Any]] = []
        self.text = ""
        self.waiting: deque[tuple[int, dict[str, Any]]] = deque()
        """Log probabilities of tokens that were not sent yet, each with the offset of its token in
        the text."""
        self.item: dict[str, Any] = {"id": item_id, "type": kind, "status": "in_progress"}
        if self._is_message:
            self.item |= {"role": "assistant", "content": []}
        else:
            self.item["summary"] = []

    def begin(self) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": self._index, "item": {**self.item}}
        yield "response.content_part.added", {**self._where, "part": self._part()}

    def add(self, text: str) -> Iterator[Event]:
        self.text += text
        while len(self.text) - self._sent >= DELTA_CHARS:
            yield self._delta(self._sent + DELTA_CHARS)

    def end(self, status: str) -> Iterator[Event]:
        if self._sent < len(self.text) or self.waiting:
            yield self._delta(len(self.text), rest=True)
        part = self._part(self.text)
        logprobs = {"logprobs": self._logprobs} if self._is_message else {}
        yield f"{self._event}.done", {**self._where, "text": self.text, **logprobs}
        yield "response.content_part.done", {**self._where, "part": part}
        self.item |= {"content": [part], "status": status}
        yield "response.output_item.done", {"output_index": self._index, "item": {**self.item}}

    def _delta(self, end: int, *, rest: bool = False) -> Event:
        delta, self._sent = self.text[self._sent : end], end
        if not self._is_message:
            return f"{self._event}.delta", {**self._where, "delta": delta}
        known = []
        while self.waiting and (rest or self.waiting[0][0] < end):
            known.append(self.waiting.popleft()[1])
        self._logprobs += known
        return f"{self._event}.delta", {**self._where, "delta": delta, "logprobs": known}

    def _part(self, text: str = "") -> dict[str, Any]:
        if not self._is_message:
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self._logprobs if text else [],
        }


class _Tokens:
    """Divides the text into its tokens, if their log probabilities are known. Whether a
    token belongs to a message is known only after it was read."""

    def __init__(self) -> None:
        self._offsets = TextOffsets()
        self._characters = 0
        self._waiting: list[TokenLogprob] = []

    def of(
        self, text: str, logprobs: Sequence[TokenLogprob]
    ) -> Iterator[tuple[str, TokenLogprob | None]]:
        if not logprobs:
            self._characters += len(text)
            yield text, None
            return
        begins = [self._offsets.next(one.piece) - self._characters for one in logprobs]
        ends = [min(max(begin, 0), len(text)) for begin in begins[1:]] + [len(text)]
        begin = 0
        for one, end in zip(logprobs, ends, strict=True):
            yield text[begin:end], one
            begin = max(begin, end)
        self._characters += len(text)

    def wait(self, known: TokenLogprob) -> None:
        """Remember a token that was read. It belongs to the next part of the answer."""
        self._waiting.append(known)

    def take(self, at: int) -> list[tuple[int, dict[str, Any]]]:
        """The remembered tokens belong to a message, whose text was read up to ``at``."""
        found = [(at, _logprob(one)) for one in self._waiting]
        self._waiting.clear()
        return found

    def drop(self) -> None:
        """The remembered tokens belong to an item without log probabilities."""
        self._waiting.clear()


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {**openai_logprob(one), "top_logprobs": [openai_logprob(other) for other in one.top]}
