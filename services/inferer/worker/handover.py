"""Jobs that go to the inferer that has the beginning of their prompt in its cache, if it is free.

The broker gives a job to any inferer that pulls. A gateway has written into its headers which one
has computed most of its prompt before. The inferer that gets the job offers it to that one, which
takes it only into a slot that is free at that moment: nobody waits.
"""

from collections.abc import Callable
from datetime import timedelta

import nats.errors
from nats.aio.msg import Msg

from services.inferer.worker.delivery import Job
from services.inferer.worker.lease import requeue
from shared.beginnings import Beginnings, Near
from shared.broker.connection import Broker
from shared.broker.refusals import TRANSIENT
from shared.logs import logger
from shared.model_names import token_of
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.codecs import skip
from shared.wire.replies import send_reply

ANSWER_S = 0.5
"""How long the other inferer may take to say whether it takes a job."""
TAKEN, REFUSED = b"taken", b"refused"

log = logger()


class Handover:
    """One inferer's offers, and what is offered to it."""

    def __init__(
        self,
        broker: Broker,
        inferer_id: str,
        model: str,
        priority: int,
        beginnings: Beginnings,
    ) -> None:
        self._broker = broker
        self._id = inferer_id
        self._model = model
        self._priority = priority
        self._beginnings = beginnings

    async def offer(self, job: Job) -> bool:
        """Offer the job to the inferer that its headers name. Returns whether it is not ours any
        more."""
        near = Near.read(job.near)
        if (
            near is None
            or near.inferer_id == self._id
            or near.priority > self._priority
            or near.fingerprint in self._beginnings
            or not job.is_first_delivery
        ):
            return False
        ends_at = self._broker.now() + timedelta(seconds=ANSWER_S)
        try:
            answer = await self._broker.nc.request(
                subjects.handover(self._model, near.inferer_id),
                job.message.data,
                ANSWER_S,
                headers=_headers(job.message, timestamp(ends_at)),
            )
        except (
            nats.errors.NoRespondersError,
            nats.errors.MaxPayloadError,
            nats.errors.BadSubjectError,
        ):
            return False  # it was certainly not received
        except TRANSIENT as error:
            # Perhaps it runs there. Here it must not: two attempts with the same number would mix
            # their tokens.
            log.warning(
                "handover_not_answered", job_id=job.id, to=near.inferer_id, error=str(error)
            )
            await requeue(job.message)
            return True
        return answer.data == TAKEN

    async def serve(self, message: Msg, take: Callable[[Msg], bool]) -> None:
        """Answer an offer; ``take`` returns whether a slot is free for the job."""
        try:
            job = self._job_in(message)
            is_taken = job is not None and take(job)
        except (ValueError, KeyError, nats.errors.Error) as error:
            skip("handover", message.subject, error)
            is_taken = False
        if message.reply:
            await send_reply(self._broker.nc, message.reply, TAKEN if is_taken else REFUSED)

    def _job_in(self, message: Msg) -> Msg | None:
        """The job as the broker delivered it; None if the offer has ended, because this inferer
        was frozen.

        Raises:
            ValueError, KeyError, nats.errors.Error: it is not one of our model's queues.
        """
        headers = dict(message.headers or {})
        ends_at = parse_timestamp(headers.pop(subjects.HEADER_OFFER_ENDS))
        subject = headers.pop(subjects.HEADER_HANDED_OVER)
        job = self._broker.nc.readdressed(
            message, subject, headers.pop(subjects.HEADER_ACK), headers
        )
        wanted = subjects.RequestSubject.parse(subject)
        model, _ = subjects.parse_consumer(job.metadata.consumer)
        if job.metadata.stream != subjects.REQUESTS or {wanted.model, model} != {
            token_of(self._model)
        }:
            raise ValueError("it is not a job of this model")
        return job if self._broker.now() < ends_at else None


def _headers(message: Msg, ends_at: str) -> dict[str, str]:
    own = {
        name: value
        for name, value in (message.headers or {}).items()
        if not name.lower().startswith(subjects.BROKERS_HEADERS)
    }
    return {
        **own,
        subjects.HEADER_HANDED_OVER: message.subject,
        subjects.HEADER_ACK: message.reply,
        subjects.HEADER_OFFER_ENDS: ends_at,
    }
