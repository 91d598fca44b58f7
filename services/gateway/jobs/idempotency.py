"""Submits that may be repeated: the same `Idempotency-Key` gives the same job, on any gateway."""

import re
from hashlib import sha256
from typing import Any

import msgspec
from msgspec.structs import replace

from services.gateway.jobs.accepted import AcceptedJob
from services.gateway.jobs.caller import Caller
from services.gateway.jobs.idempotency_record import Overtaken, read_record
from services.gateway.jobs.jobs import Jobs
from services.gateway.validation.limits import check_metadata
from services.gateway.validation.schema_size import read_schema
from services.gateway.validation.tools import check_tools
from shared.broker.connection import Broker
from shared.errors import InvalidRequest, JobAgedOut, UnknownJob
from shared.logs import logger
from shared.wire import subjects
from shared.wire.api import JobStatus, NatsSubmission, Submission
from shared.wire.fields import NO_METADATA
from shared.wire.requests import JsonSchema
from shared.wire.tools import Tool

_KEY = re.compile(r"[\x20-\x7e]{1,255}")

_encode_canonically = msgspec.json.Encoder(order="sorted").encode

log = logger()


class Idempotency:
    """Accepts jobs like `Jobs.submit`, but only one job for each key."""

    def __init__(self, broker: Broker, jobs: Jobs) -> None:
        self._broker = broker
        self._jobs = jobs

    async def submit(
        self,
        submission: Submission,
        caller: Caller,
        key: str | None,
        reply_to: str | None = None,
    ) -> AcceptedJob:
        """Accept a job, or find the one that was submitted with ``key`` before.

        Raises:
            InvalidRequest: also if ``key`` is not valid.
            KeyReused: another request was submitted with ``key``.
            See `Jobs.submit` for more.
        """
        if key is None:
            return await self._jobs.submit(submission, caller, reply_to)
        self.require_valid(key)
        return await self.submit_once(submission, caller, key, reply_to)

    @staticmethod
    def require_valid(key: str) -> None:
        """Raises: InvalidRequest: clients may not send this key."""
        if not _KEY.fullmatch(key):
            raise InvalidRequest(
                f"{subjects.HEADER_IDEMPOTENCY_KEY}: give 1 to 255 printable ASCII characters",
                subjects.HEADER_IDEMPOTENCY_KEY,
            )

    async def submit_once(
        self,
        submission: Submission,
        caller: Caller,
        key: str,
        reply_to: str | None = None,
        digest: str | None = None,
    ) -> AcceptedJob:
        """Like `submit`, also for a key that no client can send. ``digest`` is what distinguishes
        the request from others, if that is more than this submission.

        The key's record is written first, then the job is published under the id in it. A gateway
        that dies in between leaves a key without a job. So a gateway that finds a record, but no
        trace of its job, publishes the job under that id. This never produces a second visible
        result, even if the first gateway was only slow, and the job is published, run and finished
        between our read and our publish: for two minutes the broker drops the second message,
        because the message id is the job's id. After that (a gateway was frozen for that long) an
        inferer receives it, finds the first result while it computes, and stops; a second result
        would be refused, because a result is written once.
        """
        subject = subjects.idempotency(sha256(f"{caller.owner}\0{key}".encode()).hexdigest())
        digest = digest or digest_of(submission)
        while True:
            record = await read_record(self._broker, subject, digest)
            if record.job_id is not None and (job := await self._find(record.job_id)) is not None:
                log.info("request_repeated", job_id=job.id, model=job.model, state=job.state)
                format = self._jobs.answer_format(job.model, submission)
                return AcceptedJob.of_replay(job, submission.task, caller, format)
            try:
                return await self._jobs.submit(submission, caller, reply_to, record)
            except Overtaken:
                continue

    async def _find(self, job_id: str) -> JobStatus | None:
        """The job's status; None if there is no trace of it.

        Raises:
            UnknownJob, JobAgedOut: it ran, and nothing else is known of it. It does not run again.
            BrokerUnavailable: no answer.
        """
        try:
            return await self._jobs.brief_status(job_id)
        except (UnknownJob, JobAgedOut):
            state = subjects.state_of(job_id)
            if await self._broker.direct_get(subjects.STATES, last_by_subj=state) is None:
                return None
            # It ran; or the gateway that was first has published it since, and it runs now.
            return await self._jobs.brief_status(job_id)


def digest_of(submission: Submission) -> str:
    """What distinguishes two requests, whatever the order of their fields and their white space.

    How the answer is sent (``stream``) does not count.

    Raises:
        InvalidRequest: its metadata or its schema cannot be read.
    """
    check_metadata(submission.metadata)
    read: dict[str, Any] = {"metadata": msgspec.json.decode(submission.metadata or NO_METADATA)}
    if isinstance(submission.response_format, JsonSchema):
        named = submission.response_format.json_schema
        schema = read_schema(named.source, lambda: named.schema, "response_format")
        read["response_format"] = JsonSchema(replace(named, source=schema))
    if submission.tools:
        check_tools(submission)
        functions = [tool.function for tool in submission.tools]
        read["tools"] = [
            Tool("function", replace(function, parameters=function.schema))
            for function in functions
        ]
    submission = replace(submission, **read)
    if isinstance(submission, NatsSubmission):
        submission = replace(submission, stream=False)
    # Sorted are only keys that are strings, and token ids are numbers.
    plain = msgspec.to_builtins(submission, str_keys=True)
    return sha256(_encode_canonically(plain)).hexdigest()
