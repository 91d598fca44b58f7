"""Ending a job from outside: a cancel, or a deadline that has passed while it waited."""

from services.gateway.state.pending_job import PendingJob
from shared.broker.connection import Broker, unavailable_on_outage
from shared.broker.consumers import read_consumer
from shared.broker.results import send_result, store_result
from shared.model_names import is_name
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import CancelNotice
from shared.wire.results import Result, StopCode


class Cancellation:
    """Stores the result, then notifies the inferer and the caller, then removes the message from
    the queue: in this order every race is safe."""

    def __init__(self, broker: Broker, patience_s: float) -> None:
        self._broker = broker
        self._patience_s = patience_s

    async def stop(self, job: PendingJob, code: StopCode) -> Result:
        """End the job. Returns its result: the existing one, if it had one already.

        Raises:
            BrokerUnavailable: it may have been stopped all the same; `finish` does the rest.
        """
        result = job.stopped(code, self._broker.now())
        stored = await store_result(self._broker, result, self._patience_s, job.trace)
        if stored == result:
            await self.notify(job.model, job.id, code)
            await self.finish(job, stored)
        return stored

    async def notify(self, model: str, job_id: str, code: StopCode) -> None:
        """Notify the inferer that runs the job, if one does.

        Raises:
            BrokerUnavailable: the connection is down.
        """
        with unavailable_on_outage(self._broker):
            await self._broker.nc.publish(
                subjects.cancel(model, job_id), encode(CancelNotice(code))
            )

    async def finish(self, job: PendingJob, stored: Result) -> None:
        """Send the result of a cancelled job to its caller, and take the job off the queue.

        An inferer that holds the message sends the result, too. But it may not be known whether
        one does, or the inferer may be dead; a result that comes twice is better than none.

        Raises:
            BrokerUnavailable: it may not be done.
        """
        await send_result(self._broker, stored, job.reply_to, job.streams)
        with unavailable_on_outage(self._broker):
            # A message that is held is settled by its inferer: deleting it would let the next job
            # start beside it.
            if job.scheduled or not await self._is_delivered(job):
                await self._broker.delete(subjects.REQUESTS, job.message.sequence)

    async def _is_delivered(self, job: PendingJob) -> bool:
        if not is_name(job.model):
            return False
        consumer = await read_consumer(self._broker, job.model, job.priority)
        if consumer is None or consumer.delivered is None:
            return False
        return job.message.sequence <= consumer.delivered.stream_seq
