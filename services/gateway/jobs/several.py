"""The jobs of one request, which are accepted together or not at all (decision 53)."""

import asyncio
from collections.abc import Callable, Sequence
from hashlib import sha256

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency import Idempotency, digest_of
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.orphans import Orphans
from shared.errors import InvalidRequest, KeyReused, SluiceError
from shared.wire.api import Submission

Adopted = list[AcceptedJob | None]


class RefusedTogether(SluiceError):
    """Job ``number`` of several was refused because of ``cause``, so none was accepted."""

    def __init__(self, number: int, cause: SluiceError) -> None:
        super().__init__(cause.message)
        self.number = number
        self.cause = cause


class Several:
    """Accepts the jobs of a request, usually a single one."""

    def __init__(self, jobs: Jobs, idempotency: Idempotency, orphans: Orphans) -> None:
        self._jobs = jobs
        self._idempotency = idempotency
        self._orphans = orphans

    async def adopt(self, submissions: Sequence[Submission], caller: Caller) -> Adopted:
        """The orphan for each submission, or None; see `Orphans.adopt`.

        Raises:
            InvalidRequest, BrokerUnavailable: as there; then nothing is adopted.
        """
        found = await asyncio.gather(
            *(self._orphans.adopt(submission, caller) for submission in submissions),
            return_exceptions=True,
        )
        adopted = [None if isinstance(one, BaseException) else one for one in found]
        for one in found:
            if isinstance(one, BaseException):
                self.orphan(submissions, adopted)
                raise one
        return adopted

    def orphan(self, submissions: Sequence[Submission], jobs: Sequence[AcceptedJob | None]) -> None:
        """Keep the places of those ``jobs`` that there are."""
        for job, submission in zip(jobs, submissions, strict=True):
            if job is not None:
                self._orphans.add(job, submission)

    async def submit(
        self,
        submissions: Sequence[Submission],
        caller: Caller,
        key: str | None,
        adopted: Adopted,
    ) -> list[AcceptedJob]:
        """Accept the submissions that were not ``adopted``. If one is refused, the others are
        cancelled. But with a ``key`` they continue, and repeating the request adds the rest.

        Raises:
            SluiceError: a single job was refused, see `Idempotency.submit`.
            RefusedTogether: one of several was refused.
        """
        if len(submissions) == 1:
            return [adopted[0] or await self._idempotency.submit(submissions[0], caller, key)]
        jobs = list(adopted)
        number = 0
        try:
            # Errors in any job are found before the first one is accepted.
            for number in range(len(submissions)):
                await self._jobs.check(submissions[number], caller)
            digest = sha256("".join(map(digest_of, submissions)).encode()).hexdigest()
            for number, submission in enumerate(submissions):
                if jobs[number] is None:
                    jobs[number] = await self._submit(submission, caller, key, number, digest)
        except BaseException as error:
            for job in jobs:
                if job is not None and not job.survives_disconnect:
                    self._jobs.abandon(job.id, "cancelled")
            if isinstance(error, SluiceError):
                raise RefusedTogether(number, error) from error
            raise
        return [job for job in jobs if job is not None]

    async def _submit(
        self, submission: Submission, caller: Caller, key: str | None, number: int, digest: str
    ) -> AcceptedJob:
        if key is None:
            return await self._jobs.submit(submission, caller)
        self._idempotency.require_valid(key)
        # The first job has the key itself, so that the same key with another number of jobs is a
        # conflict. The other jobs have keys that no client can send.
        derived = f"{key}\0{number}" if number else key
        return await self._idempotency.submit_once(submission, caller, derived, digest=digest)


def named(
    refused: RefusedTogether, param: str, as_sent: Callable[[InvalidRequest], InvalidRequest]
) -> SluiceError:
    """Why one of several jobs was refused, which came from the list ``param``. ``as_sent`` replaces
    parameter names in errors by those that the client sent."""
    cause, item = refused.cause, f"{param}[{refused.number}]"
    if isinstance(cause, KeyReused):
        return cause  # the key is that of all of them
    if isinstance(cause, InvalidRequest):
        cause = as_sent(cause)
        if cause.param != param:
            return cause  # the error concerns all jobs
        cause.param = item
    cause.args = (f"{item}: {cause.message.removeprefix(f'{param}: ')}",)
    return cause
