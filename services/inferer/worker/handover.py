"""Jobs that go to the inferer that has the prefix of their prompt in its cache, if it is free.

The broker gives a job to any inferer that pulls. A gateway has written into its headers which one
has computed the longest prefix of its prompt. The inferer that pulled the job offers it to that
one, which takes it only into a slot that is free at that moment; otherwise the job runs where it
was pulled.
"""

import asyncio
import math
from collections.abc import Callable
from datetime import timedelta

import nats.errors
from nats.aio.msg import Msg

from services.inferer.worker.delivery import Job
from shared.broker.connection import Broker
from shared.broker.refusals import IMPOSSIBLE, TRANSIENT
from shared.logs import logger
from shared.model_names import token_of
from shared.prompt_prefixes import PromptPrefixes
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.codecs import skip
from shared.wire.nearest import NearestInferer
from shared.wire.replies import send_reply

ANSWER_S = 2.0
"""How long the other inferer may take to say whether it takes a job; normally a millisecond."""
SILENT_S = 30.0
"""How long an inferer waits before it makes another offer to one that did not answer."""
LARGEST = 2**20
"""Larger jobs (bytes) are not offered: an offer sends the job over the network again."""
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
        prefixes: PromptPrefixes,
    ) -> None:
        self._broker = broker
        self._id = inferer_id
        self._model = model
        self._priority = priority
        self._prefixes = prefixes
        self._silent: dict[str, float] = {}
        """When each inferer last failed to answer, on the loop's clock."""

    async def offer(self, job: Job, busy: int) -> bool:
        """Offer the job to the inferer that its headers name. ``busy`` is the number of other jobs
        here. Returns True if this inferer must not run the job: the other one has taken it, or may
        have."""
        nearest = NearestInferer.read(job.nearest)
        if nearest is None or not self._is_worth_offering(job, nearest):
            return False
        ends_at = self._broker.now() + timedelta(seconds=ANSWER_S)
        try:
            answer = await self._broker.nc.request(
                subjects.handover(self._model, nearest.id),
                job.message.data,
                ANSWER_S,
                headers={
                    **subjects.without_brokers(job.message.headers or {}),
                    subjects.HEADER_HANDED_OVER: job.message.subject,
                    subjects.HEADER_ACK: job.message.reply,
                    subjects.HEADER_OFFER_ENDS: timestamp(ends_at),
                    subjects.HEADER_BUSY: str(busy),
                },
            )
        except (nats.errors.NoRespondersError, *IMPOSSIBLE):
            return False  # it was certainly not received
        except TRANSIENT as error:
            # The other inferer may run it. This one must not: two attempts with the same number
            # would mix their tokens. If nobody renews the lease, the broker redelivers the job.
            log.warning("handover_not_answered", job_id=job.id, to=nearest.id, error=str(error))
            self._silent[nearest.id] = asyncio.get_running_loop().time()
            return True
        return answer.data == TAKEN

    def _is_worth_offering(self, job: Job, nearest: NearestInferer) -> bool:
        silent_at = self._silent.get(nearest.id, -math.inf)
        return (
            nearest.id != self._id
            and nearest.priority <= self._priority
            and nearest.fingerprint not in self._prefixes
            and job.is_first_delivery
            and len(job.message.data) <= LARGEST
            and asyncio.get_running_loop().time() - silent_at > SILENT_S
        )

    async def serve(self, message: Msg, take: Callable[[Msg, int], bool]) -> None:
        """Answer an offer. ``take`` gets the job, and how many other jobs the offering inferer has;
        it returns whether it has taken the job."""
        try:
            job, busy = self._job_in(message)
            is_taken = job is not None and take(job, busy)
        except (ValueError, KeyError, OverflowError, nats.errors.Error) as error:
            skip("handover", message.subject, error)
            is_taken = False
        if message.reply:
            await send_reply(self._broker.nc, message.reply, TAKEN if is_taken else REFUSED)

    def _job_in(self, message: Msg) -> tuple[Msg | None, int]:
        """The job as the broker delivered it, and how many other jobs the offering inferer has.
        None in place of the job if the offer has expired: this inferer was frozen.

        Raises:
            ValueError, KeyError, OverflowError, nats.errors.Error: the offer is invalid, or not a
                job from this model's queues.
        """
        headers = dict(message.headers or {})
        ends_at = parse_timestamp(headers.pop(subjects.HEADER_OFFER_ENDS))
        busy = int(headers.pop(subjects.HEADER_BUSY))
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
        return job if self._broker.now() < ends_at else None, busy
