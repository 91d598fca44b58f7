"""A request under `/v1` and its client: how it becomes jobs, and what becomes of these when the
client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from litestar import Request

from services.gateway.gateway import Gateway
from services.gateway.http.caller import caller_of
from services.gateway.http.client_attempt import ClientAttempt
from services.gateway.http.connection import (
    ClientDisconnected,
    require_connected,
    while_connected,
)
from services.gateway.http.preferences import Preferences
from services.gateway.http.request_end import on_request_end
from services.gateway.http.sse import KEEP_ALIVE_S, BufferedStream, OpenStreams
from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.events import JobEvent
from services.gateway.jobs.several import Adopted
from shared.background import drop
from shared.errors import SluiceError
from shared.wire.api import Submission
from shared.wire.results import Completed, Result, StopCode

HEADERS_WITHIN_S = 5.0
"""How long a stream's status line waits for the first token, so that a job that fails at once gets
its own status. After that the stream opens, before a proxy or the client times out."""

T = TypeVar("T")


class Exchange:
    """The jobs of a client that disconnects are cancelled. If it has reached its timeout, and may
    send its request again, they become orphans. They go on if it can come back to them."""

    def __init__(
        self,
        request: Request[Any, Any, Any],
        gateway: Gateway,
        streams: OpenStreams,
        key: str | None,
        *,
        is_stream: bool,
        is_background: bool = False,
    ) -> None:
        """``key`` is the `Idempotency-Key`. With ``is_background`` the client does not wait.

        Raises:
            BrokerUnavailable: the gateway is not ready.
            TooManyStreams.
        """
        gateway.require_ready()
        if is_stream:
            streams.admit(request)
        self.gateway = gateway
        self.jobs: list[AcceptedJob] = []
        self._submissions: Sequence[Submission] = ()
        self._request = request
        self._streams = streams
        self._key = key
        self._attempt = ClientAttempt.of(request)
        preferences = Preferences.parse(request.headers.getall("prefer", []))
        self._goes_on = is_background or preferences.respond_async or key is not None
        self._is_over = False
        """Whether the jobs that have not ended were cancelled."""
        # A stream keeps its client from reaching its timeout, and cancels its jobs itself.
        self._may_return = not (self._goes_on or is_stream)

    @property
    def silence_s(self) -> float:
        """How long a stream may be silent."""
        return self._attempt.within(KEEP_ALIVE_S)

    async def require_client(self) -> None:
        """Call this before work that only the client waits for.

        Raises:
            ClientDisconnected: it has left, and its jobs need not go on.
        """
        if not self._goes_on:
            await require_connected(self._request)

    async def accept(self, submissions: Sequence[Submission]) -> None:
        """Make ``jobs`` of the submissions: new ones, those of the client's key, or those that it
        has waited for before it reached its timeout.

        Raises:
            ClientDisconnected.
            SluiceError: see `Several.adopt` and `Several.submit`.
        """
        several, caller = self.gateway.several, caller_of(self._request, "openai")
        jobs: Adopted = [None] * len(submissions)
        self._submissions = submissions
        try:
            if self._may_return and self._attempt.is_retry:
                jobs = await several.adopt(submissions, caller)
                if None in jobs:
                    await require_connected(self._request)  # it has waited for an orphan
            self.jobs = await several.submit(submissions, caller, self._key, jobs)
        except ClientDisconnected:
            self._leave(jobs)
            raise
        if self._goes_on:
            await require_connected(self._request)

    async def results(self) -> dict[int, Result]:
        """Those of the jobs, by their number. If one does not complete, the others are not waited
        for, but cancelled.

        Raises:
            ClientDisconnected, GatewayStopping.
            UnknownJob, JobAgedOut: one was lost.
        """
        found: dict[int, Result] = {}
        try:
            await while_connected(self._request, self.gateway.stopping, self._collect(found))
        except ClientDisconnected:
            self._leave(self.jobs)
            raise
        except SluiceError:
            self.fail(found.__contains__)
            raise
        self.fail(found.__contains__)
        return found

    def fail(self, has_ended: Callable[[int], bool]) -> None:
        """Cancel the jobs that have not ended, because the request fails with another one."""
        self._cancel(has_ended, "cancelled")

    def open(
        self, events: AsyncGenerator[T, None], has_ended: Callable[[int], bool]
    ) -> BufferedStream[T]:
        """Read the ``events`` of the jobs in the background. Those that have not ended when the
        request has are cancelled, unless they go on; ``has_ended`` takes their number."""

        on_request_end(self._request, lambda: self._cancel(has_ended, "client_disconnected"))
        return self._streams.read(events, self._request)

    async def first(self, stream: BufferedStream[T], is_wanted: Callable[[T], bool]) -> T | None:
        """The first item of ``stream`` that ``is_wanted``, which stays to be read; None if it does
        not come within `HEADERS_WITHIN_S`.

        Raises:
            ClientDisconnected, GatewayStopping; and whatever the stream raises.
        """
        peeking = stream.peek(is_wanted)
        within_s = self._attempt.within(HEADERS_WITHIN_S)
        with suppress(TimeoutError):
            return await while_connected(self._request, self.gateway.stopping, peeking, within_s)
        return None

    async def _collect(self, found: dict[int, Result]) -> None:
        """Add results to ``found`` until it has all, or that of a job that did not complete."""
        waiting = {
            asyncio.create_task(self.gateway.jobs.wait(job.id, job), name=f"wait for {job.id}"): n
            for n, job in enumerate(self.jobs)
        }
        try:
            while waiting and all(isinstance(one, Completed) for one in found.values()):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                found.update({waiting.pop(task): task.result() for task in done})
        finally:
            drop(*waiting)

    def _cancel(self, has_ended: Callable[[int], bool], code: StopCode) -> None:
        if self._goes_on or self._is_over:
            return
        self._is_over = True
        for number, job in enumerate(self.jobs):
            if not has_ended(number):
                self.gateway.abandon(job.id, code)

    def _leave(self, jobs: Sequence[AcceptedJob | None]) -> None:
        """The client has left, which waits for these ``jobs`` of its submissions."""
        if self._may_return and self._attempt.has_timed_out:
            self.gateway.several.orphan(self._submissions, jobs)
        elif self._may_return:
            for job in jobs:
                if job is not None:
                    self.gateway.abandon(job.id)


def decides(event: JobEvent) -> bool:
    """Whether it is known with this event that a stream begins well, or that it does not."""
    return event.event in ("tokens", "result", "error")
