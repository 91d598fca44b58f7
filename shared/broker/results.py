"""Results and dead letters: written once, read by all, results sent to the caller that waits."""

from datetime import datetime

from msgspec.structs import replace

from shared.broker.connection import Broker, unavailable_on_outage
from shared.errors import BrokerUnavailable, RequestTooLarge, StoredAlready
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import Unreadable, decode_dead_letter, decode_result, encode, skip
from shared.wire.replies import send_reply
from shared.wire.results import DeadLetter, Failed, Result
from shared.wire.trace import NO_TRACE, Trace

TOO_LARGE = "result_too_large"

WORST_ESCAPE = 6
"""Bytes that are not text take up to this many times their size in JSON."""


async def read_result(broker: Broker, model: str, job_id: str) -> Result | None:
    """The stored result, or None if there is none; a replica may lag behind for a moment.

    Raises:
        BrokerUnavailable: no answer.
    """
    stored = await broker.subject_get(subjects.RESULTS, subjects.result(model, job_id))
    return None if stored is None else decode_stored(stored.subject, stored.data, broker.now())


async def find_result(broker: Broker, job_id: str, *, from_leader: bool = False) -> Result | None:
    """Like `read_result`, if the model of the job is not known.

    Raises:
        BrokerUnavailable: no answer.
    """
    get = broker.leader_get if from_leader else broker.direct_get
    stored = await get(subjects.RESULTS, last_by_subj=subjects.result_of(job_id))
    return None if stored is None else decode_stored(stored.subject, stored.data, broker.now())


def decode_stored(subject: str, data: bytes, now: datetime) -> Result:
    """The result in ``data``, or `failed` if it is not a result of the job that ``subject``
    names."""
    model, job_id = subjects.model_and_id(subject)
    try:
        result = decode_result(data)
        if subjects.result(result.model, result.id) != subject:
            raise Unreadable("it is the result of another job")
        return result
    except Unreadable as error:
        skip("result", subject, error)
        # Nothing is known of it but that it is final: no attempt can write another one.
        return Failed(
            id=job_id,
            model=model,
            attempt=0,
            queued_at=timestamp(now),
            finished_at=timestamp(now),
            code="unreadable_result",
            message=f"what is stored as the result cannot be read: {error}",
        )


async def store_result(
    broker: Broker, result: Result, patience_s: float, trace: Trace = NO_TRACE
) -> Result:
    """Store ``result`` unless the job has one, and return the one that is stored. ``trace`` are
    the job's headers of W3C trace context.

    Raises:
        BrokerUnavailable: not confirmed within ``patience_s``, or the stream refuses it; repeating
            the call is safe.
    """
    payload = encode(result)
    if len(payload) > broker.max_body:
        result = _too_large(result, len(payload))
        payload = encode(result)
    try:
        await broker.publish_stored(
            subjects.result(result.model, result.id),
            payload,
            {**trace, subjects.HEADER_EXPECTED_LAST: "0"},
            patience_s,
        )
    except RequestTooLarge:
        if isinstance(result, Failed) and result.code == TOO_LARGE:
            raise
        return await store_result(broker, _too_large(result, len(payload)), patience_s, trace)
    except StoredAlready as error:
        # Somebody's write was first; or our own, whose confirmation was lost.
        stored = await read_result(broker, result.model, result.id)
        if stored is None:
            raise BrokerUnavailable("the stored result could not be read back yet") from error
        return stored
    return result


async def store_letter(
    broker: Broker, letter: DeadLetter, patience_s: float, trace: Trace = NO_TRACE
) -> DeadLetter:
    """Store ``letter`` unless the job has one, and return the one that is stored. If it is too
    large for a message, only the beginnings of its request and its reason are kept.

    Raises:
        BrokerUnavailable: not confirmed within ``patience_s``; repeating the call is safe.
    """
    if len(encode(letter)) > broker.max_body:
        longest = broker.max_body // WORST_ESCAPE // 3
        letter = replace(letter, request=letter.request[:longest], message=letter.message[:longest])
    subject = subjects.dead(letter.model, letter.id)
    try:
        await broker.publish_stored(
            subject, encode(letter), {**trace, subjects.HEADER_EXPECTED_LAST: "0"}, patience_s
        )
    except StoredAlready as error:
        # By another attempt, which ended before it stored its result; or by this one, whose
        # confirmation was lost.
        stored = await broker.subject_get(subjects.DEAD, subject)
        if stored is None:
            raise BrokerUnavailable("the dead letter could not be read back yet") from error
        return decode_dead_letter.read(stored.data, subject) or letter
    return letter


async def send_result(broker: Broker, result: Result, reply_to: str | None, stream: bool) -> None:
    """Publish a *stored* result to the subject that waits for it, if one does.

    A streamed answer ends with an empty message.

    Raises:
        BrokerUnavailable: it could not be sent.
    """
    if reply_to is None:
        return
    with unavailable_on_outage(broker):
        await send_reply(broker.nc, reply_to, encode(result))
        if stream:
            await send_reply(broker.nc, reply_to)


def _too_large(result: Result, size: int) -> Failed:
    return Failed(
        id=result.id,
        model=result.model,
        attempt=result.attempt,
        queued_at=result.queued_at,
        started_at=result.started_at,
        finished_at=result.finished_at,
        inferer=result.inferer,
        timings=result.timings,
        owner=result.owner,
        priority=result.priority,
        retry_of=result.retry_of,
        via=result.via,
        preview=result.preview,
        response=result.response,
        code=TOO_LARGE,
        message=f"the result has {size} bytes, more than the broker takes in one message; "
        "ask for fewer tokens or send less metadata",
    )
