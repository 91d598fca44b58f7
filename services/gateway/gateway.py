"""One gateway: its connection, what it knows of the fleet, and the jobs it is asked about."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Protocol

from services.gateway.eta.forecast import Forecast
from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.bulk import Bulk
from services.gateway.jobs.dead_letters import DeadLetters
from services.gateway.jobs.events import JobEvent, job_events
from services.gateway.jobs.idempotency import Idempotency
from services.gateway.jobs.job_list import JobList
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.kept_requests import KeptRequests
from services.gateway.jobs.orphans import Orphans
from services.gateway.jobs.several import Several
from services.gateway.jobs.stored_responses import StoredResponses
from services.gateway.jobs.version_1 import Version1Requests
from services.gateway.listing.reader import JobLister
from services.gateway.settings import GatewaySettings
from services.gateway.state.fleet import Fleet
from services.gateway.state.result_listener import ResultListener
from services.gateway.state.storage import Storage
from services.gateway.state.stream_changes import StreamChanges
from services.gateway.state.waiting_jobs import WaitingJobs
from shared.background import drop, first_of
from shared.broker.connection import RETRY_DELAY_S, Broker
from shared.broker.streams import Topology, streams
from shared.broker.topology import ensure_topology, missing_streams, obstructed_streams
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable, SluiceError, TopologyError
from shared.logs import logger
from shared.wire import subjects
from shared.wire.results import StopCode

LEAST_GRACE_S = 0.5

log = logger()


class Edge(Protocol):
    def running(self, stopping: asyncio.Event, drain_s: float) -> AbstractAsyncContextManager[None]:
        """Serve until ``stopping`` is set; what has arrived by then gets ``drain_s``."""


class Gateway:
    """Holds nothing that another gateway could not find in the broker."""

    def __init__(self, settings: GatewaySettings, broker_settings: BrokerSettings) -> None:
        self.settings = settings
        self.topology = Topology(
            replicas=settings.replicas, kept_requests_h=settings.kept_requests_h
        )
        self.broker = Broker(broker_settings, "gateway")
        self.fleet = Fleet(self.broker, self.topology, settings.model_names)
        self.waiting_jobs = WaitingJobs(self.broker)
        self.forecast = Forecast(self.broker, self.fleet, self.waiting_jobs)
        self.results = ResultListener(self.broker, self.forecast.observe)
        self.storage = Storage(self.broker, settings.replicas)
        self.stream_changes = StreamChanges(
            self.broker, [str(stream.name) for stream in streams(self.topology)]
        )
        self.version_1 = Version1Requests(self.broker, settings.patience_s)
        self.kept_requests = KeptRequests(self.broker, self.topology)
        self.jobs = Jobs(
            self.broker,
            self.fleet,
            self.results,
            self.forecast,
            self.storage,
            self.kept_requests,
            settings,
        )
        self.responses = StoredResponses(self.broker, self.jobs, self.kept_requests)
        self.lister = JobLister(self.broker, settings.history_jobs)
        self.job_list = JobList(
            self.broker,
            self.jobs,
            self.forecast,
            self.lister,
            self.kept_requests,
            settings.lists_jobs,
        )
        self.idempotency = Idempotency(self.broker, self.jobs)
        self.orphans = Orphans(self.broker, self.jobs, settings.return_s, settings.patience_s)
        self.several = Several(self.jobs, self.idempotency, self.orphans)
        self.dead_letters = DeadLetters(self.broker, self.idempotency)
        self.bulk = Bulk(self.jobs, self.job_list, self.dead_letters)
        self.edge: Edge | None = None
        """The edge besides HTTP, which serves once the broker is prepared."""
        self.stopping = asyncio.Event()
        self._stopped_at = math.inf
        self.fatal: Exception | None = None
        """Why this gateway has given up; a `TopologyError` when it can never serve here."""
        self._ready = False
        self._outage: BrokerUnavailable | None = None
        self._obstructed: list[str] = []
        self._unmended: list[str] = []
        """What was wrong with the streams when last checked, and could not be repaired."""

    @asynccontextmanager
    async def running(self, on_fatal: Callable[[], None]) -> AsyncIterator[None]:
        """Connect and serve NATS in the background; a broker that is away delays nothing."""
        serving = asyncio.create_task(self._serve_or_give_up(on_fatal), name="serve")
        try:
            yield
        finally:
            serving.cancel()
            await asyncio.wait((serving,), timeout=self.settings.shutdown_s)
            await self.waiting_jobs.close()
            await self.orphans.end(self._grace_left_s())
            await self.jobs.end(self._grace_left_s())
            await self.broker.close()

    def stop(self) -> None:
        """Start the shutdown: requests in progress may finish within the grace period."""
        self._stopped_at = time.monotonic()
        self.stopping.set()

    def require_ready(self) -> None:
        """Raises: BrokerUnavailable: the broker is away, or not prepared yet."""
        if not self.broker.is_connected:
            raise BrokerUnavailable("the broker is away; nothing was accepted, try again")
        if not self._ready:
            raise BrokerUnavailable("the gateway is still preparing the broker; try again")

    def require_fit(self) -> None:
        """Like `require_ready`, and check that, as far as is known, a request can be completed.

        Raises:
            BrokerUnavailable: the broker does not answer, though it is connected, or cannot write
                its disk, or this gateway shuts down.
        """
        self.require_ready()
        if self._outage is not None:
            raise BrokerUnavailable(self._outage.message)
        self.storage.require_writable()
        if self.stopping.is_set():
            raise BrokerUnavailable("this gateway is shutting down; use another one")

    async def in_time(self, answer: Awaitable[None], begun: asyncio.Event) -> None:
        """Await ``answer``. During a shutdown, cut it off if it has not ``begun`` by half of the
        grace period; one that has begun is completed.

        Raises:
            BrokerUnavailable: it was cut off; and whatever ``answer`` raises.
        """
        answering = asyncio.ensure_future(answer)
        try:
            await first_of(answering, self.stopping)
            # It nearly always begins in time; it is cut off only if it waits for an election.
            await asyncio.wait((answering,), timeout=self.settings.shutdown_s / 2)
            if not (answering.done() or begun.is_set()):
                raise BrokerUnavailable("this gateway is shutting down; use another one")
            await answering
        finally:
            drop(answering)

    def events(
        self, job_id: str, after: str = "", accepted: AcceptedJob | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """See `job_events`."""
        return job_events(self.jobs, self.broker, job_id, after, accepted)

    def abandon(self, job_id: str, code: StopCode = "client_disconnected") -> None:
        """Cancel, in the background, a job that nobody waits for any more; not while this gateway
        stops."""
        if not self.stopping.is_set():
            self.jobs.abandon(job_id, code)

    def _grace_left_s(self) -> float:
        """Never less than a moment: a cancellation may have started just now."""
        since_s = max(0.0, time.monotonic() - self._stopped_at)
        return max(LEAST_GRACE_S, self.settings.shutdown_s - since_s)

    async def _serve_or_give_up(self, on_fatal: Callable[[], None]) -> None:
        try:
            await self._serve()
        except Exception as error:
            self.fatal = error
            on_fatal()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            await self.broker.connect()
            # Before the first reading, so that no change between the two is missed.
            await self.stream_changes.watch()
            await self.fleet.watch()
            await self.waiting_jobs.follow()
            await self._prepare()
            await stack.enter_async_context(self.results.listening())
            await self.forecast.start()
            await stack.enter_async_context(self.lister.running())
            if self.edge is not None:
                serving = self.edge.running(self.stopping, self.settings.shutdown_s)
                await stack.enter_async_context(serving)
            self._ready = True
            log.info("gateway_ready", models=sorted(self.fleet.models))
            while True:
                await self.fleet.change()
                try:
                    await self._follow()
                except BrokerUnavailable:
                    # It may have come back without its streams.
                    await self._prepare_again()

    async def _prepare(self) -> None:
        """Create or repair the streams, and read the fleet; repeated until the broker answers."""
        logged: set[str] = set()
        while True:
            try:
                changes = await ensure_topology(
                    self.broker, self.topology, self.settings.model_names
                )
                for change in changes:
                    log.info("topology_changed", change=change)
                await self._refresh()
                if changes:
                    # What callers wait for may be gone.
                    self.results.read_again()
                return
            except BrokerUnavailable as error:
                if error.message not in logged:
                    logged.add(error.message)
                    log.warning("broker_not_prepared", error=error.message)
                self._outage = error
            await asyncio.sleep(RETRY_DELAY_S)

    async def _refresh(self) -> None:
        """Read everything afresh."""
        await self._check_streams()
        await self._call(self.fleet.refresh, self.storage.refresh)

    async def _follow(self) -> None:
        """Read what may have changed."""
        if self.stream_changes.is_check_due:
            await self._check_streams()
        await self._call(self.fleet.follow, self._follow_storage)

    async def _follow_storage(self) -> None:
        await self.storage.follow(self.fleet.is_active)

    async def _check_streams(self) -> None:
        self.stream_changes.checking()
        try:
            missing = await missing_streams(self.broker, self.topology)
            await self.kept_requests.refresh(subjects.KEPT in missing)
            if others := [name for name in missing if name != subjects.KEPT]:
                log.warning("streams_missing", streams=others)
                raise BrokerUnavailable(f"streams are missing: {', '.join(others)}")
            self._obstructed = await obstructed_streams(self.broker, self.topology)
            if self._obstructed and self._obstructed != self._unmended:
                raise BrokerUnavailable("; ".join(self._obstructed))
        except BrokerUnavailable:
            self.stream_changes.check_again()
            raise
        if missing:
            self.stream_changes.check_again()

    async def _call(self, *reads: Callable[[], Awaitable[None]]) -> None:
        """Call ``reads``, and then what is done at each turn."""
        for call in (*reads, self.version_1.dead_letter_some, self.orphans.cancel_overdue):
            try:
                await call()
            except SluiceError:
                raise
            except Exception:
                # Of whatever was found there: a gateway that ends would find it again.
                log.exception("refresh_failed")
        self._outage = None

    async def _prepare_again(self) -> None:
        try:
            await self._prepare()
        except TopologyError as error:
            log.error("topology_differs", error=error.message)
            self._unmended = self._obstructed
