"""Lists of jobs, in which no job waits that should have ended, and the details of one."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from services.gateway.eta.forecast import Estimate, Forecast
from services.gateway.eta.line import MOST_IN_LINE
from services.gateway.eta.position import QueuedJob
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.kept_requests import KeptRequests
from services.gateway.jobs.timeline import timeline_of
from services.gateway.listing.reader import JobLister
from services.gateway.state.pending_job import OVERDUE, find_message
from shared.broker.connection import Broker
from shared.broker.stored_messages import StoredMessage
from shared.errors import ListingRefused, Overloaded, SluiceError
from shared.model_names import token_of
from shared.wire import subjects
from shared.wire.api import TaskState
from shared.wire.codecs import decode_dead_letter, decode_request_head, decode_state_event
from shared.wire.listing import JobDetails, JobPage, JobQuery, RequestSource
from shared.wire.subjects import HEADER_TRACEPARENT
from shared.wire.trace import trace_of

NULL = Raw(b"null")
MAX_PAGES = 64
"""That are made at once: a thread makes one after another."""
MAY_WAIT: tuple[TaskState, ...] = ("PENDING", "RETRY")
MAX_EVENTS = 1000
"""Changes of state of a job that are shown."""
MAX_EVENT_BYTES = 4 * 1024 * 1024


class JobList:
    def __init__(
        self,
        broker: Broker,
        jobs: Jobs,
        forecast: Forecast,
        lister: JobLister,
        kept_requests: KeptRequests,
        is_allowed: bool,
    ) -> None:
        self._broker = broker
        self._jobs = jobs
        self._forecast = forecast
        self._lister = lister
        self._kept_requests = kept_requests
        self._is_allowed = is_allowed
        self._pages = 0

    def require_allowed(self) -> None:
        """Raises: ListingRefused: who can connect may not see the jobs of others."""
        if not self._is_allowed:
            raise ListingRefused(
                "this gateway lists neither jobs nor dead letters, since other machines can "
                "connect to it and an id is all it takes to read or cancel a job; name jobs by "
                "their ids, or set GATEWAY_LIST_JOBS=true if all who can connect may do that"
            )

    async def page(self, query: JobQuery) -> JobPage:
        """Like `find`, with the positions and ETAs of the jobs that wait."""
        with self._counted():
            return await self._with_estimates(await self._find(query))

    async def find(self, query: JobQuery) -> JobPage:
        """The jobs that match, as of now. Of those whose deadline has passed while nobody looked,
        some are expired here.

        Raises:
            ListingRefused: see `require_allowed`.
            Overloaded: too many others are being made.
            InvalidRequest: the cursor is not one of such a list.
            BrokerUnavailable: no answer.
        """
        with self._counted():
            return await self._find(query)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A page is made in the block."""
        self.require_allowed()
        if self._pages == MAX_PAGES:
            raise Overloaded(f"{MAX_PAGES} lists are being made; try again")
        self._pages += 1
        try:
            yield
        finally:
            self._pages -= 1

    async def _find(self, query: JobQuery) -> JobPage:
        if late := await self._lister.late(OVERDUE):
            await asyncio.gather(*map(self._expire, late))
        page = await self._lister.page(query)
        if self._kept_requests.are_kept:
            return page
        return replace(page, jobs=[replace(job, preview="") for job in page.jobs])

    async def _with_estimates(self, page: JobPage) -> JobPage:
        """``page`` as of a moment later: what has begun or ended since then gets no estimate."""
        waiting = {job.id: token_of(job.model) for job in page.jobs if job.state in MAY_WAIT}
        if not waiting:
            return page
        models = await self._forecast.queues(set(waiting.values()))
        queued: dict[str, list[QueuedJob]] = {}
        for job in await self._lister.queued(waiting, models.values()):
            queued.setdefault(job.request.model, []).append(job)
        estimates: dict[str, Estimate] = {}
        for token, jobs in queued.items():
            first = await self._lister.first_queued(models[token], MOST_IN_LINE)
            estimates |= await self._forecast.estimate_queued(models[token], jobs, first)
        unknown = Estimate()
        return replace(
            page, jobs=[estimates.get(job.id, unknown).added_to(job) for job in page.jobs]
        )

    async def details(self, job_id: str) -> JobDetails:
        """Raises: UnknownJob, JobAgedOut, BrokerUnavailable."""
        status = await self._jobs.status(job_id)
        queued, kept, dead, events, retries = await asyncio.gather(
            find_message(self._broker.direct_get, job_id),
            self._kept_requests.find(job_id),
            self._broker.direct_get(subjects.DEAD, last_by_subj=subjects.dead_of(job_id)),
            self._broker.direct_get_all(
                subjects.EVENTS,
                seq=1,
                next_by_subj=subjects.state_events_of(job_id),
                batch=MAX_EVENTS,
                max_bytes=MAX_EVENT_BYTES,
            ),
            self._lister.page(JobQuery(retry_of=job_id, limit=1)),
        )
        found: dict[RequestSource, bytes | None] = {
            "queue": queued.data if queued else None,
            "kept": kept.data if kept else None,
            "dead": _request_in(dead) if dead else None,
        }
        source, request = next(
            ((name, data) for name, data in found.items() if data and _is_json(data)), (None, None)
        )
        head = decode_request_head.read(request, f"request of {job_id}") if request else None
        if not self._kept_requests.are_kept:
            source, request = None, None
        timeline, is_complete = timeline_of(
            status,
            head.via if head else None,
            filter(None, (decode_state_event.read(one.data, one.subject) for one in events)),
        )
        return JobDetails(
            status=status,
            request=NULL if request is None else Raw(request),
            request_from=source,
            timeline=timeline,
            events_complete=is_complete,
            dead=dead is not None,
            retried_as=retries.jobs[0].id if retries.jobs else None,
            trace_id=next(filter(None, map(_trace_id, (queued, kept, dead))), None),
        )

    async def _expire(self, job_id: str) -> None:
        with suppress(SluiceError):
            await self._jobs.find(job_id)


def _request_in(letter: StoredMessage) -> bytes | None:
    read = decode_dead_letter.read(letter.data, letter.subject)
    return None if read is None else read.request.encode()


def _is_json(data: bytes) -> bool:
    """Whether it can be shown: what is on the queue may have been put there by hand, and a dead
    letter may hold the beginning of a request."""
    try:
        data.decode()
        msgspec.json.decode(data, type=Raw)
    except (ValueError, RecursionError):
        return False
    return True


def _trace_id(message: StoredMessage | None) -> str | None:
    trace = trace_of(message.headers) if message else {}
    parts = trace.get(HEADER_TRACEPARENT, "").split("-")
    return parts[1] if len(parts) > 3 else None
