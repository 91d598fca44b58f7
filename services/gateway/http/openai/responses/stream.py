"""A response's events, with their numbers.

The first three always have the numbers 0, 1 and 2 (the last one is omitted if the job never ran).
The others are derived from the answer (`output.py`), so a number shows how much of the response a
client has, and any gateway can resume after it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from services.gateway.http.openai.responses.body import ResponseBody
from services.gateway.http.openai.responses.output import Event, Output
from services.gateway.jobs.events import JobEvent, Tokens
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.api import JobError, JobStatus
from shared.wire.results import Completed

CREATED, QUEUED, IN_PROGRESS, FIRST_OUTPUT = range(4)

ENDINGS = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.failed",  # OpenAI has no separate event for it
}


class NumberedEvent(NamedTuple):
    type: str
    body: dict[str, Any]


class ResponseEvents:
    """The events of one response, made from those of its job. Events up to number ``after``, which
    the client already has, are omitted."""

    def __init__(
        self, response: ResponseBody, job_id: str, format: Callable[[], AnswerFormat], after: int
    ) -> None:
        """``response`` is the queued response. ``format`` is called when the answer begins, because
        only a running inferer knows the format."""
        self._response = response
        self._job_id = job_id
        self._format = format
        self._after = after
        self._number = CREATED
        self._output: Output | None = None
        self._attempt = 0
        """The attempt that was running when the stream was opened."""
        self._held: list[Event] = []
        """Events of an earlier attempt, held back until the running one has written the same."""
        self.is_finished = False
        """Whether the last event has been made."""

    @property
    def last_number(self) -> int:
        """The number of the last event that was made."""
        return self._number - 1

    def opening(self) -> Iterator[NumberedEvent]:
        """The first events."""
        for kind in ("response.created", "response.queued"):
            yield from self._numbered([(kind, {"response": self._response})])

    def of(self, event: JobEvent) -> Iterator[NumberedEvent]:
        """The events for an event of the job."""
        data = event.data
        if event.event == "queued" and isinstance(data, JobStatus):
            self._attempt = data.attempts
        elif event.event == "started":
            yield from self._begin()
        elif event.event == "retrying":
            self._held.clear()
            if max(self._number - 1, self._after) >= FIRST_OUTPUT:
                yield self._error(
                    "attempt_differs",
                    "a second attempt wrote a different text; read the response again from the "
                    "beginning",
                )
            self._output = None
        elif isinstance(data, Tokens):
            yield from self._begin()
            self._held += self._answer.add(data.text, data.logprobs)
            if data.attempt >= self._attempt:
                yield from self._release()
        elif isinstance(data, JobError):
            yield self._error(data.code, data.message)
        elif event.event == "result" and isinstance(data, JobStatus):
            yield from self._end(data)

    def of_result(self, result: Completed) -> Iterator[NumberedEvent]:
        """All that follow the first ones, of a job that has completed."""
        yield from self._begin()
        yield from self._numbered(self._answer.add(result.text, result.logprobs or ()))
        yield from self._end(JobStatus.of(result))

    def error(self, code: str, message: str, param: str | None = None) -> NumberedEvent:
        """An event with the reason why the stream ends early. It has the number of the event before
        it, so a client that resumes after it misses nothing."""
        body = {"code": code, "message": message, "param": param}
        number = max(self._number - 1, self._after, 0)
        return NumberedEvent("error", {"type": "error", "sequence_number": number, **body})

    def _error(self, code: str, message: str) -> NumberedEvent:
        self.is_finished = True
        return self.error(code, message)

    @property
    def _answer(self) -> Output:
        if self._output is None:
            self._output = Output(self._job_id, self._format())
        return self._output

    def _begin(self) -> Iterator[NumberedEvent]:
        if self._number == IN_PROGRESS:
            running = {"response": self._response.in_progress()}
            yield from self._numbered([("response.in_progress", running)])

    def _end(self, status: JobStatus) -> Iterator[NumberedEvent]:
        if status.started_at is not None:
            yield from self._begin()
        self._number = max(self._number, FIRST_OUTPUT)
        yield from self._release()
        output: list[dict[str, Any]] = []
        if status.result is not None:
            answer = self._answer
            is_whole = status.result.finish_reason != "length"
            yield from self._numbered(answer.finish(is_whole=is_whole))
            output = answer.items
        else:  # the events of what it wrote may be gone
            self._number = max(self._number, self._after + 1)
        ended = self._response.ended_as(status, output)
        yield from self._numbered([(ENDINGS[ended.status], {"response": ended})])
        self.is_finished = True
        if self._after > self.last_number:
            yield self.error(
                "invalid_request", beyond_the_end(self._after, self.last_number), "starting_after"
            )

    def _release(self) -> Iterator[NumberedEvent]:
        held, self._held = self._held, []
        yield from self._numbered(held)

    def _numbered(self, events: Iterable[Event]) -> Iterator[NumberedEvent]:
        for kind, fields in events:
            number, self._number = self._number, self._number + 1
            if number > self._after:
                body = {"type": kind, "sequence_number": number, **fields}
                yield NumberedEvent(kind, body)


def last_number(response: ResponseBody, job_id: str, result: Completed) -> int:
    """The number of the last event of a response that has completed."""
    format = result.format or PLAIN
    events = ResponseEvents(response, job_id, lambda: format, after=-1)
    for _ in (*events.opening(), *events.of_result(result)):
        pass
    return events.last_number


def beyond_the_end(after: int, last: int) -> str:
    return f"starting_after: {after} is beyond the last event of this response, {last}"
