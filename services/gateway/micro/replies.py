"""Replies over NATS to callers that no inferer answers, because another caller submitted the job
first, or its deadline passes while it waits. Cancels jobs whose callers have disconnected."""

import asyncio
from contextlib import aclosing, suppress
from datetime import datetime
from functools import partial

from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import stored_events
from services.gateway.jobs.jobs import READ_AGAIN_S, Jobs
from services.gateway.jobs.token_merger import Restarted, TokenReader
from services.gateway.micro.interest import Interest
from services.gateway.state.pending_job import PendingJob
from services.gateway.state.result_listener import ResultListener
from services.gateway.statuses import status_of
from shared.background import Tasks, drop, start
from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.broker.results import send_result
from shared.errors import BrokerUnavailable, Overloaded, SluiceError
from shared.logs import logger
from shared.wire.codecs import decode_token_frame, encode
from shared.wire.events import TokenFrame
from shared.wire.logprobs import TokenLogprob
from shared.wire.replies import send_reply
from shared.wire.results import Completed, Result

MOST_JOBS = 1_000
MOST_CALLERS = 10_000
"""Limits of one gateway. A streamed job costs a consumer; another caller costs little."""

READ_EVERY_S = 30.0
"""How often a job that a NATS caller waits for is read: the broker may have lost it."""

log = logger()


class Replies:
    """Sends what an inferer would send, as long as this gateway lives."""

    def __init__(self, broker: Broker, jobs: Jobs, results: ResultListener) -> None:
        self._broker = broker
        self._jobs = jobs
        self._results = results
        self._interest = Interest(broker)
        self._answers: dict[tuple[str, bool], _Reply] = {}
        self._tasks = Tasks()

    def send(self, accepted: AcceptedJob, reply_to: str, stream: bool) -> None:
        """Send the job's result to ``reply_to``, in the background, once it is there.

        With ``stream`` first its tokens from the beginning, and an empty message at the end.

        Raises:
            Overloaded: the limit of waiting callers is reached.
        """
        callers = sum(len(answer.callers) for answer in self._answers.values())
        if len(self._answers) >= MOST_JOBS or callers >= MOST_CALLERS:
            raise Overloaded(
                f"{callers} callers already wait at this gateway for {len(self._answers)} jobs "
                "with repeated keys; use infer.status, or try again later"
            )
        answer = self._answers.get((accepted.id, stream))
        if answer is None or answer.is_ending:
            answer = _Reply(self._broker, self._jobs, accepted.model, accepted.id, stream)
            self._answers[accepted.id, stream] = answer
            self._tasks.start(self._run(answer), f"answer {accepted.id}")
        answer.add(reply_to)

    def watch(self, accepted: AcceptedJob, reply_to: str) -> None:
        """Until the job has ended, in the background: let it expire at its deadline, because an
        inferer checks that only when a slot is free, and a NATS caller does not poll; and cancel it
        when ``reply_to`` has no subscriber any more, unless its caller may come back with its key.
        If the broker has lost the job, the caller gets an error."""
        if accepted.deadline is not None:
            watching = self._watch(accepted, accepted.deadline, reply_to)
            self._tasks.start(watching, f"watch {accepted.id}")

    async def stop(self) -> None:
        """Send an error to the callers that only this gateway would answer."""
        await self._tasks.end(timeout_s=0)

    async def _run(self, answer: "_Reply") -> None:
        try:
            await answer.run()
        finally:
            key = answer.job_id, answer.stream
            if self._answers.get(key) is answer:
                del self._answers[key]

    async def _watch(self, accepted: AcceptedJob, deadline: datetime, reply_to: str) -> None:
        leaving = None
        if not accepted.survives_disconnect:
            leaving = start(self._abandon_when_left(accepted, reply_to), "watch a caller")
        try:
            await self._until_ended(accepted, deadline)
        except SluiceError as error:
            await _refuse(self._broker, reply_to, error)
        finally:
            if leaving is not None:
                leaving.cancel()

    async def _until_ended(self, accepted: AcceptedJob, deadline: datetime) -> None:
        """Raises: UnknownJob, JobAgedOut: the broker has lost the job."""
        while True:
            left_s = self._seconds_to(deadline)
            with self._results.expecting(accepted.model, accepted.id, at_once=False) as announced:
                await asyncio.wait((announced,), timeout=min(left_s or READ_AGAIN_S, READ_EVERY_S))
            if announced.done() and announced.result() is not None:
                return
            try:
                # Past its deadline, a waiting job expires when it is read; a running one is
                # ended by its inferer.
                if not isinstance(await self._jobs.find(accepted.id), PendingJob):
                    return
            except BrokerUnavailable:
                continue
            except SluiceError:
                if not self._jobs.runs(accepted.id):
                    raise

    async def _abandon_when_left(self, accepted: AcceptedJob, reply_to: str) -> None:
        await self._interest.lost(reply_to)
        self._jobs.abandon(accepted.id)

    def _seconds_to(self, moment: datetime) -> float:
        return max(0.0, (moment - self._broker.now()).total_seconds())


class _Reply:
    """One job's answer: read once, and sent to each caller from its beginning."""

    def __init__(self, broker: Broker, jobs: Jobs, model: str, job_id: str, stream: bool) -> None:
        self.model, self.job_id, self.stream = model, job_id, stream
        self.callers: list[str] = []
        self.is_ending = False
        """Whether it is too late to add a caller."""
        self._broker = broker
        self._jobs = jobs
        self._frames: list[bytes] = []
        self._reader = TokenReader()
        self._sent: list[int] = []
        """How many of the frames each caller has got."""
        self._news = asyncio.Event()

    def add(self, reply_to: str) -> None:
        self.callers.append(reply_to)
        self._sent.append(0)
        self._news.set()

    async def run(self) -> None:
        """Send the tokens so far and those that follow, then the result."""
        finished = asyncio.create_task(self._jobs.wait(self.job_id), name=f"wait for {self.job_id}")
        reading = asyncio.create_task(self._read(finished), name=f"read {self.job_id}")
        reading.add_done_callback(lambda _: self._news.set())
        try:
            while not self.is_ending:
                await self._news.wait()
                self._news.clear()
                self.is_ending = reading.done()
                await self._send_frames()
            await reading
            result = await finished
            self._complete(result)
            await self._send_frames()
            for reply_to in self.callers:
                send = partial(send_result, self._broker, result, reply_to, self.stream)
                await self._broker.through_outages(send)
        except asyncio.CancelledError:
            await self._refuse(
                BrokerUnavailable("this gateway is shutting down; send the request again")
            )
            raise
        except SluiceError as error:
            log.warning("answer_not_sent", job_id=self.job_id, why=error.message)
            await self._refuse(error)
        finally:
            self.is_ending = True
            drop(reading, finished)

    async def _read(self, finished: asyncio.Task[Result]) -> None:
        if not self.stream:
            await asyncio.wait((finished,))
            return
        last = (0, 0)
        async with aclosing(
            stored_events(self._broker, self.model, self.job_id, finished)
        ) as events:
            async for message in events:
                if message is None or message.subject.endswith(".state"):
                    continue
                frame = decode_token_frame.read(message.data, message.subject)
                if frame is None:
                    continue
                end = frame.attempt, frame.index + len(frame.tokens)
                if end > last:  # after an outage they come again
                    last = end
                    self._reader.add(frame)
                    self._frames.append(message.data)
                    self._news.set()

    def _complete(self, result: Result) -> None:
        """Add the text that is in the result and in no frame that was read: frames may be lost, or
        stored after the result."""
        if self.stream and isinstance(result, Completed):
            attempt, index = self._reader.position
            for step in self._reader.finish(result.attempt, result.choices):
                if isinstance(step, Restarted):
                    attempt, index = 0, 0
                    continue
                # Callers have the last tokens without text, though their text comes only now.
                known = self._reader.tokens_of(step.choice) if step.attempt == attempt else 0
                logprobs: list[TokenLogprob | None] = [*step.logprobs[max(0, known - step.index) :]]
                frame = TokenFrame(
                    attempt=step.attempt,
                    index=index,
                    tokens=[step.text, *[""] * (len(logprobs) - 1)],
                    logprobs=logprobs or None,
                    choice=step.choice,
                )
                index += len(frame.tokens)
                self._frames.append(encode(frame))

    async def _send_frames(self) -> None:
        for number, reply_to in enumerate(self.callers):
            # Advanced before sending: frames lost with the connection are in the result as well.
            frames = self._frames[self._sent[number] :]
            self._sent[number] += len(frames)
            with suppress(*TRANSIENT):
                for frame in frames:
                    await send_reply(self._broker.nc, reply_to, frame)

    async def _refuse(self, error: SluiceError) -> None:
        for reply_to in self.callers:
            await _refuse(self._broker, reply_to, error)


async def _refuse(broker: Broker, reply_to: str, error: SluiceError) -> None:
    """In the form of the service's other errors (ADR-32)."""
    why = f"{error.code}: {error.message}"
    headers = {ERROR_HEADER: why, ERROR_CODE_HEADER: str(status_of(error))}
    with suppress(*TRANSIENT):
        await send_reply(broker.nc, reply_to, headers=headers)
