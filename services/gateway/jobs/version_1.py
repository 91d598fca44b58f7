"""Requests of wire version 1, whose clients publish to the queue themselves. No inferer can read
them, so they become dead letters with the reason."""

from shared.broker.connection import Broker
from shared.broker.results import send_result, store_letter, store_result
from shared.broker.stored_messages import StoredMessage
from shared.errors import BrokerUnavailable, SluiceError, StreamRefused
from shared.logs import logger
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.requests import priority_of
from shared.wire.results import DeadLetter, Failed
from shared.wire.trace import trace_of

PAGE = 50
PAGE_BYTES = 16 * 1024 * 1024

CODE = "invalid_request"
WHY = (
    "it was published to {subject}, where wire version 1 of Sluice had its queue, and this is "
    "version {version}: send it to a gateway (POST /jobs, infer.submit), or publish a request of "
    "this version to infer.requests.<model>.<priority>.public.<id>"
)

log = logger()


class Version1Requests:
    """Takes these requests off the queue, some with each call. Several gateways may do it at
    once. A request that cannot be stored elsewhere stays, and its turn comes again after all
    others."""

    def __init__(self, broker: Broker, patience_s: float) -> None:
        self._broker = broker
        self._patience_s = patience_s
        self._next_sequence = 1

    async def dead_letter_some(self) -> None:
        """
        Raises:
            BrokerUnavailable: no answer.
        """
        found = await self._broker.direct_get_all(
            subjects.REQUESTS,
            seq=self._next_sequence,
            next_by_subj=subjects.REQUESTS_V1_WILDCARD,
            batch=PAGE,
            max_bytes=PAGE_BYTES,
        )
        if not found:
            self._next_sequence = 1
        for message in found:
            # Before the attempt: whatever it raises must not hold up the requests behind it.
            self._next_sequence = message.sequence + 1
            try:
                await _dead_letter(self._broker, message, self._patience_s)
            except SluiceError as error:
                log.warning("version_1_request_stays", subject=message.subject, error=error.message)
                if isinstance(error, BrokerUnavailable) and not isinstance(error, StreamRefused):
                    return


async def _dead_letter(broker: Broker, message: StoredMessage, patience_s: float) -> None:
    _, _, model, priority, job_id = message.subject.split(".")
    if not (subjects.is_token(model) and subjects.is_id(job_id)):
        # No letter can be stored for it: as part of a subject it is a pattern, or too long.
        await broker.delete(subjects.REQUESTS, message.sequence)
        log.warning("version_1_request_dropped", subject=message.subject[: subjects.LONGEST_ID])
        return
    now = timestamp(broker.now())
    why = WHY.format(subject=message.subject, version=subjects.WIRE_VERSION)
    letter = DeadLetter(
        id=job_id,
        model=model,
        code=CODE,
        message=why,
        attempts=0,
        at=now,
        request=message.data.decode("utf-8", "replace"),
        priority=priority_of(priority),
    )
    result = Failed(
        id=job_id,
        model=model,
        attempt=0,
        queued_at=timestamp(parse_timestamp(message.time)),
        finished_at=now,
        priority=priority_of(priority),
        code=CODE,
        message=why,
    )
    trace = trace_of(message.headers)
    await store_letter(broker, letter, patience_s, trace)
    stored = await store_result(broker, result, patience_s, trace)
    await send_result(broker, stored, message.headers.get(subjects.HEADER_REPLY_TO), stream=False)
    await broker.delete(subjects.REQUESTS, message.sequence)
    log.warning("version_1_request_dead_lettered", subject=message.subject)
