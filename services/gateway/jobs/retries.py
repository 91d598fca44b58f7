"""Retries of failed attempts: an inferer asks for them, and the gateway has the broker schedule
them."""

from datetime import timedelta

from shared.broker.connection import Broker
from shared.errors import InvalidRequest, UnknownJob
from shared.logs import logger
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_state_event
from shared.wire.requests import RetryRequest, RetryScheduled

LONGEST_PAUSE = timedelta(minutes=10)
"""The maximum, whatever an inferer asks for."""

PATIENCE_S = 2.0
"""With the time that one try takes, less than an inferer waits: it requeues the job then."""

log = logger()


class Retries:
    """Schedules requests that are on the queue. It reads the request from the broker, and does not
    take it from the inferer that asks."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def schedule(self, model: str, job_id: str, wanted: RetryRequest) -> RetryScheduled:
        """Have the broker put the request back on the queue at ``wanted.at``, as it was. It leaves
        the queue when the inferer acknowledges it. ``model`` is the model's token.

        Raises:
            InvalidRequest: the message is not a request of this job, or its last attempt is not
                the one that failed or was returned.
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
        # One that was asked for long ago may find that the next attempt already runs: the schedule
        # would replace the message that its inferer holds.
        state = await self._broker.leader_get(
            subjects.STATES, last_by_subj=subjects.state(model, job_id)
        )
        last = None if state is None else decode_state_event.read(state.data, state.subject)
        if last is None or last.state == "started" or last.attempt != wanted.attempt:
            raise InvalidRequest(f"attempt {wanted.attempt} of the job {job_id} has not failed")
        at = min(parse_timestamp(wanted.at), self._broker.now() + LONGEST_PAUSE)
        headers = {
            **subjects.without_brokers(message.headers),
            # With the id of the request or of an earlier schedule, the broker would drop it as a
            # duplicate, and the ack that follows would destroy the job. The attempt alone does not
            # make the id unique: its number may come from a replica that lags.
            subjects.HEADER_MSG_ID: f"{job_id}/{wanted.attempt}/{wanted.sequence}",
            subjects.HEADER_SCHEDULE: f"@at {timestamp(at)}",
            subjects.HEADER_SCHEDULE_TARGET: subject.request,
        }
        await self._broker.publish_stored(subject.schedule, message.data, headers, PATIENCE_S)
        log.info("retry_scheduled", job_id=job_id, model=model, until=timestamp(at))
        return RetryScheduled(timestamp(at))
