"""Answers over NATS to those whom no inferer answers: their job was somebody else's first."""

import asyncio
from contextlib import suppress

from services.gateway.job_events import stored_events
from services.gateway.jobs import Jobs
from shared import subjects
from shared.broker import RETRY_DELAY_S, TRANSIENT, Broker
from shared.errors import BrokerUnavailable, SluiceError
from shared.logs import logger
from shared.results import send_result

log = logger()


class Answers:
    """Sends what an inferer sends to the first caller, as long as this gateway lives."""

    def __init__(self, broker: Broker, jobs: Jobs) -> None:
        self._broker = broker
        self._jobs = jobs
        self._sending: set[asyncio.Task[None]] = set()

    def send(self, job_id: str, reply_to: str, stream: bool) -> None:
        """Send the job's result to ``reply_to``, in the background, once it is there.

        With ``stream`` first its tokens from the beginning, and an empty message at the end.
        """
        task = asyncio.create_task(self._send(job_id, reply_to, stream))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def stop(self) -> None:
        for task in self._sending:
            task.cancel()

    async def _send(self, job_id: str, reply_to: str, stream: bool) -> None:
        finished = asyncio.create_task(self._jobs.wait(job_id))
        try:
            if stream:
                async for _, message in stored_events(self._broker, job_id, finished):
                    if message.subject == subjects.token_events(job_id):
                        with suppress(*TRANSIENT):  # the result has it all
                            await self._broker.nc.publish(reply_to, message.data)
            result = await finished
            while True:
                try:
                    await send_result(self._broker, result, reply_to, stream)
                    return
                except BrokerUnavailable:
                    await asyncio.sleep(RETRY_DELAY_S)
        except SluiceError as error:
            log.warning("answer_not_sent", job_id=job_id, why=error.message)
        finally:
            finished.cancel()
