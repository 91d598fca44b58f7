"""Results: written once, read by everybody, sent to whoever waits."""

from datetime import datetime

from shared.broker.connection import Broker, unavailable_on_outage
from shared.errors import BrokerUnavailable, RequestTooLarge, StoredAlready
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import Unreadable, decode_result, encode, skip
from shared.wire.replies import send_reply
from shared.wire.results import Failed, Result


async def read_result(broker: Broker, job_id: str, *, from_leader: bool = False) -> Result | None:
    """The stored result, or None while there is none; a replica may say so a moment too long.

    Raises:
        BrokerUnavailable: no answer.
    """
    get = broker.leader_get if from_leader else broker.direct_get
    stored = await get(subjects.RESULTS, last_by_subj=subjects.result(job_id))
    return None if stored is None else decode_stored(job_id, stored.data, broker.now())


def decode_stored(job_id: str, data: bytes, now: datetime) -> Result:
    """The result in ``data``, or `failed` if it is not a result of this job."""
    try:
        result = decode_result(data)
        if result.id != job_id:
            raise Unreadable("it is the result of another job")
        return result
    except Unreadable as error:
        skip("result", subjects.result(job_id), error)
        # Nothing is known of it but that it is final: no attempt can write another one.
        return Failed(
            id=job_id,
            model="",
            attempt=0,
            queued_at=timestamp(now),
            finished_at=timestamp(now),
            code="unreadable_result",
            message=f"what is stored as the result cannot be read: {error}",
        )


async def store_result(broker: Broker, result: Result, patience_s: float) -> Result:
    """Store ``result`` unless the job has one, and return the one that is stored.

    Raises:
        BrokerUnavailable: not confirmed within ``patience_s``, or the stream refuses it; repeating
            the call is safe.
    """
    payload = encode(result)
    if len(payload) > broker.max_body:
        return await store_result(broker, _too_large(result, len(payload)), patience_s)
    try:
        await broker.publish_stored(
            subjects.result(result.id), payload, {subjects.HEADER_EXPECTED_LAST: "0"}, patience_s
        )
    except RequestTooLarge:
        return await store_result(broker, _too_large(result, len(payload)), patience_s)
    except StoredAlready as error:
        # Somebody's write was first; or our own, whose confirmation was lost.
        stored = await read_result(broker, result.id)
        if stored is None:
            raise BrokerUnavailable("the stored result could not be read back yet") from error
        return stored
    return result


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
        code="result_too_large",
        message=f"the result has {size} bytes, more than the broker takes in one message; "
        "ask for fewer tokens or send less metadata",
    )
