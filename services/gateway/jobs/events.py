"""A job's events as a stream that can be resumed where it was interrupted."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress

import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.token_merger import Restarted, Step, TokenReader
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
from shared.wire.results import Completed, Result

log = logger()

TAIL = "tail"
"""The id of tokens that were taken from the result, not from the stream."""

END = "end"

ON_ITS_WAY_S = 0.05
"""How long a reader waits for each stored event once the job has finished."""


class Tokens(Struct, frozen=True):
    attempt: int
    index: int
    text: str


class JobEvent(Struct, frozen=True):
    """``id``: ``0`` for the first, else the sequence in ``EVENTS``, ``tail`` or ``end``.

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
    broker no longer has them, `retrying` is sent and the text starts again from the beginning. With
    ``accepted``, for a job that was just submitted here, `queued` is left out. If it is new, ids
    have no meaning: events are read as they are published, which costs less than a consumer.

    Raises:
        UnknownJob, JobAgedOut, BrokerUnavailable: before the first event, and without ``accepted``.
    """
    seen = int(after) if after.isascii() and after.isdecimal() and len(after) < 20 else -1
    resumes = seen > 0
    if accepted is None:
        status = await jobs.status(job_id)
        model = status.model
    else:
        status, model = None, accepted.model
    if resumes and not await _is_event_of(broker, model, job_id, seen):
        seen = -1
    if status is not None and after not in (TAIL, END) and seen < 0:
        yield JobEvent("0", "queued", status)
    finished = asyncio.create_task(jobs.wait(job_id, accepted), name=f"wait for {job_id}")
    reader, read, is_whole = TokenReader(resumes=resumes), 0, not resumes
    try:
        if after not in (TAIL, END):
            source = (
                stored_events(broker, model, job_id, finished)
                if accepted is None or accepted.is_replay
                else _live_events(broker, model, job_id, finished, reader)
            )
            async with aclosing(source) as messages:
                async for sequence, message in messages:
                    if read == 0 and seen > 0 and _is_the_first(message):
                        reader.begin()
                        is_whole = True
                    read = sequence
                    for event in _translate(message, read, reader):
                        # A text that starts again is sent as a whole.
                        if read > seen or (isinstance(event.data, Tokens) and not is_whole):
                            yield event
        result = await finished
        if after not in (TAIL, END) and isinstance(result, Completed):
            for step in reader.finish(result.attempt, result.text):
                yield _token_event(TAIL, step, before=read)
        yield JobEvent(END, "result", JobStatus.of(result))
    except (UnknownJob, JobAgedOut) as error:
        yield JobEvent(END, "error", JobError(error.code, error.message))
    finally:
        drop(finished)


async def _is_event_of(broker: Broker, model: str, job_id: str, event_id: int) -> bool:
    """Whether the broker still has the event with this id, and it belongs to this job and to the
    current stream, not to one that was deleted.

    Raises:
        BrokerUnavailable: no answer.
    """
    found = await broker.direct_get(
        subjects.EVENTS, seq=event_id, next_by_subj=subjects.events(model, job_id)
    )
    # The id of `retrying` is the one before that of its text.
    return found is not None and found.sequence - event_id in (0, 1)


def _is_the_first(message: Msg) -> bool:
    """Whether nothing came before it in the job's life: every attempt begins with `started`."""
    if not message.subject.endswith(".state"):
        return False
    state = decode_state_event.read(message.data, message.subject)
    return state is not None and (state.state, state.attempt, state.code) == ("started", 1, None)


def _translate(message: Msg, sequence: int, reader: TokenReader) -> list[JobEvent]:
    event_id = str(sequence)
    if message.subject.endswith(".state"):
        state = decode_state_event.read(message.data, message.subject)
        if state is None:
            return []
        # The text of a failed attempt stays valid if the next attempt produces the same text. An
        # attempt that died with its inferer is reported as a `started` with a code.
        failed = state.state == "retrying" or (state.state == "started" and state.code)
        name = "attempt_failed" if failed else state.state
        return [JobEvent(event_id, name, state)]
    frame = decode_token_frame.read(message.data, message.subject)
    if frame is None:
        return []
    return [_token_event(event_id, step, before=sequence - 1) for step in reader.add(frame)]


def _token_event(event_id: str, step: Step, before: int) -> JobEvent:
    if isinstance(step, Restarted):
        # Its text follows under ``event_id``. A reader that is cut off between the two resumes
        # before both.
        return JobEvent(str(before), "retrying", Tokens(step.attempt, 0, ""))
    return JobEvent(event_id, "tokens", Tokens(step.attempt, step.index, step.text))


async def _live_events(
    broker: Broker, model: str, job_id: str, finished: asyncio.Task[Result], reader: TokenReader
) -> AsyncGenerator[tuple[int, Msg], None]:
    """Like `stored_events`, but yields messages as they are published, with 0 for their sequences.
    Once one is missed, reads the stream from the first on. The caller passes what this yields to
    ``reader``, which notices a missed frame."""
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
                    yield 0, message
                elif finished.done():
                    return
        finally:
            with suppress(nats.errors.Error, OSError, RuntimeError):
                await subscription.unsubscribe()
    async with aclosing(stored_events(broker, model, job_id, finished)) as messages:
        async for sequence, message in messages:
            yield sequence, message


async def stored_events(
    broker: Broker, model: str, job_id: str, finished: asyncio.Task[Result]
) -> AsyncGenerator[tuple[int, Msg], None]:
    """The job's messages in ``EVENTS`` with their sequences, from the first on, until the job has
    finished; through outages of the broker.

    Frames may be stored after the result, from which a reader takes what is missing.
    """
    read = 0
    while True:
        try:
            # Closed here, not when it is garbage-collected: the generator holds a consumer.
            async with aclosing(_events_until_outage(broker, model, job_id, finished)) as messages:
                async for message in messages:
                    sequence = message.metadata.sequence.stream
                    if sequence > read:  # else read before the broker went away
                        read = sequence
                        yield sequence, message
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
