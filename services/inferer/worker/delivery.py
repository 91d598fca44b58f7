"""One delivery of one job, as an inferer holds it."""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Any, Final, Literal

from msgspec import UNSET
from msgspec.structs import replace
from nats.aio.msg import Msg

from shared.errors import PromptTooLong, SluiceError
from shared.model_names import name_of
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.answers import PLAIN, AnswerFormat
from shared.wire.codecs import decode_request
from shared.wire.events import StateEvent
from shared.wire.inferers import RunningJob
from shared.wire.requests import InferenceRequest, Work, priority_of
from shared.wire.results import (
    Cancelled,
    Choice,
    Completed,
    Expired,
    Failed,
    StopCode,
    Timings,
    Usage,
    stopped,
)
from shared.wire.trace import trace_of

REQUEUED: Final = "requeued"
Interruption = StopCode | Literal["requeued"]


class NoResult(Enum):
    """How a job leaves its inferer while its result is still open."""

    REQUEUED = "it stays on the queue, for another inferer"
    RETRY_SCHEDULED = "a schedule puts it back on the queue later"
    RETRY_DELAYED = "no gateway could schedule its retry: the queue delivers it again soon"


class Interrupted(Exception):
    """The job was stopped before its answer was complete."""


class Job:
    """What the message says, and what has become of the job since."""

    def __init__(self, message: Msg, now: Callable[[], datetime]) -> None:
        """``now`` is the broker's time."""
        self._now = now
        headers = message.headers or {}
        self.message = message
        self.subject = subjects.RequestSubject.parse(message.subject)
        self.id = self.subject.job_id
        self.owner = self.subject.owner
        self.model = self.subject.model
        self.priority = priority_of(self.subject.priority)
        self.trace = trace_of(headers)
        self.reply_to: str | None = headers.get(subjects.HEADER_REPLY_TO)
        self.nearest: str = headers.get(subjects.HEADER_NEAREST, "")
        """Which inferer has computed the longest prefix of its prompt; see `NearestInferer`."""
        # A message that was scheduled is a new one to the broker, and counts from 1 again.
        self.is_first_delivery = (
            message.metadata.num_delivered == 1 and subjects.HEADER_SCHEDULER not in headers
        )
        self.attempt = 1
        self.returns = 0
        """How many inferers in a row have returned it because they cannot run it."""
        self.crash: StateEvent | None = None
        """The start of the attempt before this one, if that ended with its inferer."""
        self.started_at: str | None = None
        self._started_s = 0.0
        self.work: Work | None = None
        self.deadline: datetime | None = None
        self.malformed: str | None = None
        """Why the message is not a request; then there is no ``request``."""
        self.queued_at = timestamp(message.metadata.timestamp)
        self.interrupting: asyncio.Future[Interruption] = asyncio.get_running_loop().create_future()
        self.announced: asyncio.Task[None] | None = None
        """The publishing of its `started`."""
        self.settled = asyncio.Event()
        self.count_tokens: Callable[[], tuple[int, int | None]] = lambda: (0, None)
        """How many tokens of answers there are so far, and how many of the prompt are still to be
        computed; None if that is not known."""
        try:
            self.request: InferenceRequest = decode_request(message.data).with_said_sampling()
            self.model = name_of(self.subject.model, self.request.model)
            self.queued_at = self.request.queued_at or self.queued_at
            if subjects.HEADER_DEADLINE in headers:
                self.deadline = parse_timestamp(headers[subjects.HEADER_DEADLINE])
        except ValueError as error:
            self.malformed = f"the message cannot be read by this version of Sluice: {error}"
            self.queued_at = timestamp(message.metadata.timestamp)

    @property
    def interruption(self) -> Interruption | None:
        return self.interrupting.result() if self.interrupting.done() else None

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and self.deadline <= self._now()

    @property
    def running_ms(self) -> float:
        """How long its attempt has run, by a clock that cannot be set."""
        return (time.monotonic() - self._started_s) * 1000

    @property
    def seconds_left(self) -> float | None:
        if self.deadline is None:
            return None
        return max(0.0, (self.deadline - self._now()).total_seconds())

    def interrupt(self, code: Interruption) -> None:
        """Stop the job; the first reason counts."""
        if not self.interrupting.done():
            self.interrupting.set_result(code)

    def count_attempt(self, last: StateEvent | None) -> None:
        """Number this attempt after the last one; one that was requeued does not count."""
        if last is not None:
            self.attempt = last.attempt + (last.state != "returned")
            self.returns = last.returns
            # A start that nothing followed: no inferer is left to say what became of it.
            self.crash = last if last.state == "started" else None

    def start(self, n_ctx: int) -> None:
        """The attempt begins, on a model with ``n_ctx`` tokens of context."""
        self.started_at = timestamp(self._now())
        self._started_s = time.monotonic()
        self.work = self.request.work(n_ctx)

    def progress(self) -> RunningJob | None:
        """How far it is; None before it has started."""
        if self.started_at is None or self.work is None:
            return None
        completion_tokens, prompt_tokens_left = self.count_tokens()
        return RunningJob(
            id=self.id,
            attempt=self.attempt,
            started_at=self.started_at,
            completion_tokens=completion_tokens,
            max_tokens=self.work.most_tokens,
            work=self.work,
            prompt_tokens_left=prompt_tokens_left,
        )

    def completed(
        self,
        inferer: str,
        choices: list[Choice],
        usage: Usage,
        timings: Timings,
        answer_format: AnswerFormat = PLAIN,
    ) -> Completed:
        first, *others = choices
        return Completed(
            **self._common(),
            inferer=inferer,
            timings=timings,
            text=first.text,
            finish_reason=first.finish_reason,
            usage=usage,
            task=self.request.task,
            work=self.work,
            logprobs=first.logprobs,
            other_choices=others,
            format=None if answer_format == PLAIN else answer_format,
        )

    def failed(self, error: SluiceError, inferer: str) -> Failed:
        param: str | None = getattr(error, "param", None)
        if isinstance(error, PromptTooLong):
            param = param or self.request.prompt_field
        return Failed(
            **self._common(), inferer=inferer, code=error.code, message=error.message, param=param
        )

    def dead_lettered(self, code: str, message: str) -> Failed:
        """Failed without being run this time."""
        return Failed(**self._common(attempts_before=True), code=code, message=message)

    def stopped(self, code: StopCode, inferer: str | None = None) -> Cancelled | Expired:
        """Stopped by its deadline or by somebody, running or before it ran."""
        return stopped(
            code, **self._common(attempts_before=self.started_at is None), inferer=inferer
        )

    def out_of_time(self, inferer: str, why: str) -> Cancelled | Expired:
        """Failed, with a deadline before another attempt could begin."""
        message = f"no time is left to try again before the deadline; the attempt failed: {why}"
        return replace(self.stopped("timed_out", inferer), message=message)

    def _common(self, attempts_before: bool = False) -> dict[str, Any]:
        readable = self.malformed is None
        return {
            "id": self.id,
            "model": self.model,
            "attempt": self.attempt - attempts_before,
            "queued_at": self.queued_at,
            "started_at": self.started_at,
            "finished_at": timestamp(self._now()),
            "owner": self.owner,
            "metadata": self.request.metadata if readable else UNSET,
            "priority": self.priority,
            "retry_of": self.request.retry_of if readable else None,
            "via": self.request.via if readable else None,
            "preview": self.request.preview if readable else "",
            "response": self.request.response if readable else None,
        }
