"""Answers over NATS to those whom no inferer answers: their job was somebody else's first, or its
deadline passes while it waits."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from datetime import datetime

from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from services.gateway.finished import FinishedJobs
from services.gateway.job_events import stored_events
from services.gateway.jobs import LOOK_AGAIN_S, Jobs
from services.gateway.problems import status_of
from services.gateway.ticket import Ticket
from services.gateway.unfinished import Unfinished
from shared import subjects
from shared.broker import RETRY_DELAY_S, TRANSIENT, Broker
from shared.errors import BrokerUnavailable, SluiceError
from shared.logs import logger
from shared.results import send_result

STOP_S = 1.0

log = logger()


class Answers:
    """Sends what an inferer would send, as long as this gateway lives."""

    def __init__(self, broker: Broker, jobs: Jobs, finished: FinishedJobs) -> None:
        self._broker = broker
        self._jobs = jobs
        self._finished = finished
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, job_id: str, reply_to: str, stream: bool) -> None:
        """Send the job's result to ``reply_to``, in the background, once it is there.

        With ``stream`` first its tokens from the beginning, and an empty message at the end.
        """
        self._start(self._send(job_id, reply_to, stream))

    def expire(self, ticket: Ticket) -> None:
        """Have the job expire at its deadline, in the background, unless it has ended before: an
        inferer looks only when one is free, and a caller over NATS does not look at all."""
        if ticket.deadline is not None:
            self._start(self._expire(ticket.id, ticket.deadline))

    async def stop(self) -> None:
        """Let those whom nobody else will answer know that they have to ask again."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _expire(self, job_id: str, deadline: datetime) -> None:
        pause_s = self._seconds_to(deadline)
        while True:
            with self._finished.expecting(job_id) as announced:
                await asyncio.wait((announced,), timeout=pause_s)
            if announced.done() and announced.result() is not None:
                return
            try:
                # Too late, it is expired by being looked at; if it runs, its inferer stops it.
                if not isinstance(await self._jobs.find(job_id), Unfinished):
                    return
            except BrokerUnavailable:
                pass
            except SluiceError:
                return
            pause_s = max(self._seconds_to(deadline), LOOK_AGAIN_S)

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
        except asyncio.CancelledError:
            await self._refuse(
                reply_to, 503, "broker_unavailable: this gateway shuts down; ask again"
            )
            raise
        except SluiceError as error:
            log.warning("answer_not_sent", job_id=job_id, why=error.message)
            await self._refuse(reply_to, status_of(error), f"{error.code}: {error.message}")
        finally:
            finished.cancel()

    async def _refuse(self, reply_to: str, status: int, why: str) -> None:
        """In the form of the service's other errors (ADR-32)."""
        headers = {ERROR_HEADER: why, ERROR_CODE_HEADER: str(status)}
        with suppress(*TRANSIENT):
            await self._broker.nc.publish(reply_to, headers=headers)

    def _seconds_to(self, moment: datetime) -> float:
        return max(0.0, (moment - self._broker.now()).total_seconds())
