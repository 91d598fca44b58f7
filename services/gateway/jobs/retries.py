"""Attempts that failed and are made again: an inferer asks for a schedule in the broker."""

from datetime import timedelta

from shared.broker.connection import Broker
from shared.errors import InvalidRequest, UnknownJob
from shared.logs import logger
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.requests import RetryRequest, RetryScheduled

LONGEST_PAUSE = timedelta(minutes=10)
"""Whatever an inferer asks for."""

log = logger()


class Retries:
    """Schedules requests that are on the queue; it takes none from the inferer that asks."""

    def __init__(self, broker: Broker, patience_s: float) -> None:
        self._broker = broker
        self._patience_s = patience_s

    async def schedule(self, model: str, job_id: str, wanted: RetryRequest) -> RetryScheduled:
        """Have the broker put the request back on the queue at ``wanted.at``, as it was. It leaves
        the queue when the inferer acknowledges it. ``model`` is the model's token.

        Raises:
            InvalidRequest: the message is not a request of this job.
            UnknownJob: it is not on the queue any more.
            StreamRefused: the stream takes no schedules, or not this one.
            BrokerUnavailable: not confirmed. It may be scheduled all the same; asking again is
                safe.
        """
        message = await self._broker.direct_get(subjects.REQUESTS, seq=wanted.sequence)
        if message is None:
            raise UnknownJob(f"the request of the job {job_id} is not on the queue any more")
        try:
            subject = subjects.RequestSubject.parse(message.subject)
        except ValueError:  # of version 1
            subject = None
        if subject is None or (
            (subject.model, subject.job_id, subject.is_scheduled) != (model, job_id, False)
        ):
            raise InvalidRequest(f"message {wanted.sequence} is not a request of the job {job_id}")
        at = min(parse_timestamp(wanted.at), self._broker.now() + LONGEST_PAUSE)
        kept = {
            name: value
            for name, value in message.headers.items()
            if not name.lower().startswith(subjects.BROKERS_HEADERS)
        }
        headers = {
            **kept,
            # With the id of the request, or that of an earlier schedule, the broker would take it
            # for a repetition and drop it, and the ack that follows would destroy the job. The
            # attempt alone does not make it another: its number may come from a replica that lags.
            subjects.HEADER_MSG_ID: f"{job_id}/{wanted.attempt}/{wanted.sequence}",
            subjects.HEADER_SCHEDULE: f"@at {timestamp(at)}",
            subjects.HEADER_SCHEDULE_TARGET: subject.request,
        }
        await self._broker.publish_stored(subject.schedule, message.data, headers, self._patience_s)
        log.info("retry_scheduled", job_id=job_id, model=model, until=timestamp(at))
        return RetryScheduled(timestamp(at))
