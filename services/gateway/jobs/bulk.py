"""Several jobs or dead letters at once: cancelled, retried, dropped."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from msgspec.structs import asdict

from services.gateway.jobs.caller import Caller
from services.gateway.jobs.dead_letters import DeadLetters
from services.gateway.jobs.job_list import JobList
from services.gateway.jobs.jobs import Jobs
from shared.errors import BrokerUnavailable, InvalidRequest, Overloaded, SluiceError
from shared.wire.api import TaskState
from shared.wire.listing import (
    UNFINISHED,
    BulkDeadRequest,
    BulkReport,
    BulkRequest,
    DeadFilter,
    JobFilter,
    JobQuery,
    NotDone,
)

MOST = 1000
PAGE = 200
AT_ONCE = 4
"""A dead letter may have several megabytes."""


class Bulk:
    def __init__(self, jobs: Jobs, job_list: JobList, dead_letters: DeadLetters) -> None:
        self._jobs = jobs
        self._job_list = job_list
        self._dead_letters = dead_letters
        # Each search reads the whole stream.
        self._searching = asyncio.Lock()

    async def cancel(self, request: BulkRequest) -> BulkReport:
        """Cancel jobs that wait or run; one that ends meanwhile is reported as not done.

        Raises:
            ListingRefused: ``where`` is given, and this gateway does not list jobs.
            InvalidRequest: ``where`` asks for jobs that have ended.
            BrokerUnavailable: no answer, or the gateway does not know all jobs.
        """
        if request.where is None:
            ids = list(dict.fromkeys(request.ids or ()))
            return await _each(ids, len(ids), self._jobs.cancel)
        states = _states(request.where)
        ids, matched = await self._find(request.where, states, request.at_most or MOST)
        # One may have been started since it was found.
        return await _each(ids, matched, partial(self._jobs.cancel, states=states))

    async def retry(self, request: BulkDeadRequest, caller: Caller) -> BulkReport:
        """Raises: ListingRefused, as `cancel`. Overloaded: another search has not ended.
        BrokerUnavailable: no answer.
        """
        ids, matched = await self._find_dead(request)
        return await _each(ids, matched, lambda one: self._dead_letters.retry(one, caller))

    async def drop(self, request: BulkDeadRequest) -> BulkReport:
        """Raises: ListingRefused, as `cancel`. Overloaded: another search has not ended.
        BrokerUnavailable: no answer.
        """
        ids, matched = await self._find_dead(request)
        return await _each(ids, matched, self._dead_letters.drop)

    async def _find(
        self, where: JobFilter, states: list[TaskState], most: int
    ) -> tuple[list[str], int]:
        """The ids of ``most`` of the jobs in ``states`` that match, and how many match."""
        ids: list[str] = []
        matched, cursor = None, None
        while True:
            page = await self._job_list.find(
                JobQuery(
                    **{**asdict(where), "state": states},
                    limit=min(PAGE, most - len(ids)),
                    cursor=cursor,
                )
            )
            if not page.covers.complete:
                raise BrokerUnavailable(
                    "the gateway does not know all jobs: it has just started (try again in a few "
                    "seconds), or more jobs wait than fit its memory (give `ids`)"
                )
            matched = page.total if matched is None else matched
            ids += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None or len(ids) == most:
                return ids, max(matched, len(ids))

    async def _find_dead(self, request: BulkDeadRequest) -> tuple[list[str], int]:
        if request.where is None:
            ids = list(dict.fromkeys(request.ids or ()))
            return ids, len(ids)
        self._job_list.require_allowed()
        if self._searching.locked():
            raise Overloaded("dead letters are being searched for another request; try again")
        most = request.at_most or MOST
        async with self._searching:
            found = await self._dead_ids(request.where, most)
        return found[:most], len(found)

    async def _dead_ids(self, where: DeadFilter, most: int) -> list[str]:
        """The ids of letters that match. Where there are more than ``most``, of some more."""
        found: list[str] = []
        before: int | None = None
        while True:
            page = await self._dead_letters.page(PAGE, before)
            found += [letter.id for letter in page.letters if where.matches(letter)]
            before = page.before
            if before is None or len(found) > most:
                return found


def _states(where: JobFilter) -> list[TaskState]:
    """Raises: InvalidRequest: jobs have ended in one of them."""
    states = where.state or list(UNFINISHED)
    assert not isinstance(states, str), "the filter has made a list of it"
    if not set(states) <= set(UNFINISHED):
        raise InvalidRequest(
            "only jobs that have not ended can be cancelled: where.state must be "
            + " or ".join(UNFINISHED),
            "where.state",
        )
    return states


async def _each(
    ids: list[str], matched: int, act: Callable[[str], Awaitable[object]]
) -> BulkReport:
    """Do ``act`` for each of ``ids``, some at a time; one that fails stops no other."""
    turn = asyncio.Semaphore(AT_ONCE)
    not_done: list[NotDone] = []

    async def one(job_id: str) -> None:
        async with turn:
            try:
                await act(job_id)
            except SluiceError as error:
                not_done.append(NotDone(id=job_id, code=error.code, message=error.message))

    await asyncio.gather(*map(one, ids))
    return BulkReport(
        matched=matched,
        done=len(ids) - len(not_done),
        not_done=not_done,
        left=matched - len(ids),
    )
