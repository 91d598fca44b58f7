"""Lists of jobs, in which no job waits that should have ended."""

import asyncio
from contextlib import suppress

from services.gateway.jobs.jobs import Jobs
from services.gateway.listing.reader import JobLister
from services.gateway.state.pending_job import OVERDUE
from shared.errors import SluiceError
from shared.wire.listing import JobPage, JobQuery


class JobList:
    def __init__(self, jobs: Jobs, lister: JobLister) -> None:
        self._jobs = jobs
        self._lister = lister

    async def page(self, query: JobQuery) -> JobPage:
        """The jobs that match, as of now. Of those whose deadline has passed while nobody looked,
        some are expired here.

        Raises:
            InvalidRequest: the cursor is not one of such a list.
            BrokerUnavailable: no answer.
        """
        if late := await self._lister.late(OVERDUE):
            await asyncio.gather(*map(self._expire, late))
        return await self._lister.page(query)

    async def _expire(self, job_id: str) -> None:
        with suppress(SluiceError):
            await self._jobs.find(job_id)
