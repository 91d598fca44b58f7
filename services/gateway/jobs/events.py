"""A job's events as a stream that can be resumed where it was interrupted."""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, suppress
from typing import NamedTuple

import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.token_merger import (
    NOTHING,
    UNKNOWN,
    Restarted,
    Sent,
    Step,
    TokenReader,
)
from shared.background import drop
from shared.broker.client import consumer_of
from shared.broker.connection import RETRY_DELAY_S, Broker, unavailable_on_outage
from shared.errors import BrokerUnavailable, JobAgedOut, UnknownJob
from shared.job_ids import new_job_id
from shared.logs import logger
from shared.wire import subjects
from shared.wire.api import JobError, JobStatus
from shared.wire.codecs import decode_state_event, decode_token_frame
from shared.wire.events import StateEvent
from shared.wire.logprobs import TokenLogprob
from shared.wire.results import Completed, Result

log = logger()

END = "end"
"""The id of the last event."""

EVENT_ID = re.compile(r"\d{1,9}(\.\d{1,9}){3}\.(-1|\d{1,10})", re.ASCII)

ON_ITS_WAY_S = 0.05
"""How long a reader waits for each stored event once the job has finished."""


class Tokens(Struct, frozen=True, omit_defaults=True):
    """Text of the answer ``choice``; ``index`` is that of its first token in this answer."""

    attempt: int
    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0


class EventId(NamedTuple):
    """How much of a job's events a client has. It is made from their content, not from the
    broker's sequences: messages can get others when a node of a cluster fails (decision 6)."""

    states: int = 0
    """How many state events."""
    sent: Sent = NOTHING

    def __str__(self) -> str:
        return ".".join(str(number) for number in (self.states, *self.sent))

    @classmethod
    def of(cls, text: str) -> "EventId":
        """What ``text``, a Last-Event-ID, stands for. With one that was never given out, it is
        unknown how much of the text the client has."""
        if not text:
            return cls()
        if not EVENT_ID.fullmatch(text):
            return cls(0, UNKNOWN)
        states, *sent = map(int, text.split("."))
        return cls(states, Sent(*sent))


class JobEvent(Struct, frozen=True):
    """``id``: an `EventId` or ``end``.

    ``event``: ``queued``, ``started``, ``returned``, ``attempt_failed`` (another follows),
    ``tokens``, ``retrying`` (the text starts again from the beginning), ``result``, ``error`` (the
    broker has lost the job: there will be no result).
    """

    id: str
    event: str
    data: JobStatus | StateEvent | Tokens | JobError


async def job_events(
    jobs: Jobs, broker: Broker, job_id: str, after: str = "", accepted: AcceptedJob | None = None
) -> AsyncGenerator[JobEvent, None]:
    """Everything that happened to the job and happens from now on, ending with its result, or with
    an `error` where its stream was deleted meanwhile; through outages of the broker too.

    ``after`` is the id of the last event that was received: events up to it are left out. If the
    text turns out not to begin with what was received, `retrying` is sent and it starts again from
    the beginning. With ``accepted``, for a job that was just submitted here, `queued` is left out.
    If it is new, events are read as they are published, which costs less than a consumer.

    Raises:
        UnknownJob, JobAgedOut, BrokerUnavailable: before the first event, and without ``accepted``.
    """
    if accepted is None:
        status = await jobs.status(job_id)
        model = status.model
    else:
        status, model = None, accepted.model
    received = EventId.of(after)
    if status is not None and (not after or received.sent == UNKNOWN):
        yield JobEvent(str(EventId(0, received.sent)), "queued", status)
    finished = asyncio.create_task(jobs.wait(job_id, accepted), name=f"wait for {job_id}")
    reader, states, read = TokenReader(received.sent), received.states, 0
    try:
        source = (
            stored_events(broker, model, job_id, finished)
            if accepted is None or accepted.is_replay
            else _live_events(broker, model, job_id, finished, reader)
        )
        async with aclosing(source) as messages:
            async for message in messages:
                if message is None:
                    read = 0
                elif message.subject.endswith(".state"):
                    state = decode_state_event.read(message.data, message.subject)
                    if read == 0 and not _is_the_first(state):
                        states = 0  # events are gone: rather twice than never
                    read += 1
                    if state is not None and read > states:
                        states = read
                        yield JobEvent(str(EventId(states, reader.sent)), _name(state), state)
                else:
                    frame = decode_token_frame.read(message.data, message.subject)
                    for event in _token_events(states, reader, reader.add(frame) if frame else []):
                        yield event
        result = await finished
        if isinstance(result, Completed):
            steps = reader.finish(result.attempt, result.choices)
            for event in _token_events(states, reader, steps):
                yield event
        yield JobEvent(END, "result", JobStatus.of(result))
    except (UnknownJob, JobAgedOut) as error:
        yield JobEvent(END, "error", JobError(error.code, error.message))
    finally:
        drop(finished)


def _is_the_first(state: StateEvent | None) -> bool:
    """Whether a job's life begins with it."""
    return state is not None and (state.state, state.attempt, state.code) == ("started", 1, None)


def _name(state: StateEvent) -> str:
    """The text of a failed attempt stays valid if the next attempt produces the same text. An
    attempt that died with its inferer is reported as a `started` with a code."""
    failed = state.state == "retrying" or (state.state == "started" and state.code)
    return "attempt_failed" if failed else state.state


def _token_events(states: int, reader: TokenReader, steps: list[Step]) -> Iterator[JobEvent]:
    for step in steps:
        if isinstance(step, Restarted):
            # Its text follows: a reader that is cut off between the two has nothing of it.
            event_id = EventId(states, Sent(step.attempt))
            yield JobEvent(str(event_id), "retrying", Tokens(step.attempt, 0, ""))
        else:
            event_id = EventId(states, reader.sent)
            tokens = Tokens(step.attempt, step.index, step.text, step.logprobs, step.choice)
            yield JobEvent(str(event_id), "tokens", tokens)


async def _live_events(
    broker: Broker, model: str, job_id: str, finished: asyncio.Task[Result], reader: TokenReader
) -> AsyncGenerator[Msg | None, None]:
    """Like `stored_events`, but yields messages as they are published. Once one is missed, reads
    the stream. The caller passes what this yields to ``reader``, which notices a missed frame."""
    arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
    is_whole = True

    def miss() -> None:
        nonlocal is_whole
        is_whole = False
        arrived.put_nowait(None)

    finished.add_done_callback(lambda _: arrived.put_nowait(None))
    with ExitStack() as left:
        left.callback(broker.on_reconnect(miss))
        subject = subjects.events(model, job_id)
        subscription = await broker.nc.subscribe_directly(subject, arrived.put_nowait)
        try:
            while is_whole and not reader.has_gap:
                message = await arrived.get()
                if message is not None:
                    yield message
                elif finished.done():
                    return
        finally:
            with suppress(nats.errors.Error, OSError, RuntimeError):
                await subscription.unsubscribe()
    async with aclosing(stored_events(broker, model, job_id, finished)) as messages:
        async for message in messages:
            yield message


async def stored_events(
    broker: Broker, model: str, job_id: str, finished: asyncio.Task[Result]
) -> AsyncGenerator[Msg | None, None]:
    """The job's messages in ``EVENTS``, until the job has finished; through outages of the broker.
    None before the first one: after an outage they come again from the first one on.

    Frames may be stored after the result, from which a reader takes what is missing.
    """
    while True:
        yield None
        try:
            # Closed here, not when it is garbage-collected: the generator holds a consumer.
            async with aclosing(_events_until_outage(broker, model, job_id, finished)) as messages:
                async for message in messages:
                    yield message
            return
        except (BrokerUnavailable, nats.js.errors.APIError) as error:
            # APIError: the node that held this reader's consumer is gone.
            log.warning("events_interrupted", job_id=job_id, error=str(error))
            await asyncio.sleep(RETRY_DELAY_S)


async def _events_until_outage(
    broker: Broker, model: str, job_id: str, finished: asyncio.Task[Result]
) -> AsyncGenerator[Msg, None]:
    arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
    finished.add_done_callback(lambda _: arrived.put_nowait(None))
    # Named here, so that it can be deleted even if it is not known whether it was created.
    name = new_job_id()
    config = ConsumerConfig(name=name)
    subscribing = asyncio.create_task(
        broker.js.subscribe(
            subjects.events(model, job_id),
            cb=arrived.put,
            ordered_consumer=True,
            stream=subjects.EVENTS,
            config=config,
        ),
        name=f"follow {job_id}",
    )
    try:
        with unavailable_on_outage(broker):
            # Shielded: one that is cut off in the middle would leave its consumer behind.
            subscription = await asyncio.shield(subscribing)
            # If the client recreates the consumer, this name may still be in use.
            config.name = None
            info = await subscription.consumer_info()
        # What was there when the reading began is read to its end, finished or not.
        history = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
        while history > 0 or not finished.done():
            try:
                async with asyncio.timeout(ON_ITS_WAY_S if finished.done() else None):
                    message = await arrived.get()
            except TimeoutError:
                return
            if message is not None:
                history -= 1
                yield message
    finally:
        await _unsubscribe(broker, subscribing, name)


async def _unsubscribe(
    broker: Broker, subscribing: asyncio.Task[JetStreamContext.PushSubscription], name: str
) -> None:
    with suppress(nats.errors.Error, nats.js.errors.Error):
        subscription = await subscribing
        name = consumer_of(subscription)
        await subscription.unsubscribe()
    with suppress(nats.errors.Error):
        # Without this the broker keeps the consumer for another 5 s.
        await broker.nc.publish(f"$JS.API.CONSUMER.DELETE.{subjects.EVENTS}.{name}")
