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
from shared.wire.api import Submission
from shared.wire.results import Result

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

    async def results(self) -> list[Result]:
        """Those of the jobs.

        Raises:
            ClientDisconnected, GatewayStopping.
            UnknownJob, JobAgedOut: one was lost.
        """
        waiting = asyncio.gather(*(self.gateway.jobs.wait(job.id, job) for job in self.jobs))
        try:
            return await while_connected(self._request, self.gateway.stopping, waiting)
        except ClientDisconnected:
            self._leave(self.jobs)
            raise

    def open(
        self, events: AsyncGenerator[T, None], has_ended: Callable[[int], bool]
    ) -> BufferedStream[T]:
        """Read the ``events`` of the jobs in the background. Those that have not ended when the
        request has are cancelled, unless they go on; ``has_ended`` takes their number."""

        def cancel() -> None:
            for number, job in enumerate(self.jobs):
                if not (self._goes_on or has_ended(number)):
                    self.gateway.abandon(job.id)

        on_request_end(self._request, cancel)
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
