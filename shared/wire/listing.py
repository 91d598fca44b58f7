"""Lists of jobs: what is asked for, and what is returned."""

import re
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.structs import force_setattr

from shared.timestamps import parse_timestamp
from shared.wire.api import DeadLetterHead, Eta, JobStatus, TaskState
from shared.wire.fields import Count, JobId, Metadata, check_times
from shared.wire.requests import Priority, Via
from shared.wire.results import Timings, Usage
from shared.wire.subjects import PUBLIC

PAGE = 50
LONGEST_VALUE = 16 * 1024
"""Of a filter: metadata has no more."""
MAX_MEMBERS = 32
"""Members of a job's metadata that filters find: each takes memory and time of every gateway."""
UNFINISHED: tuple[TaskState, ...] = ("PENDING", "STARTED", "RETRY")

JobSort = Literal["accepted", "finished", "waited", "ran", "tokens"]
Text = Annotated[str, Meta(min_length=1, max_length=LONGEST_VALUE)]
ID_PREFIX = "^[0-9a-f]{4}[0-9a-f-]{0,32}$"
"""The id of a job, or its first characters, at least four."""
States = Annotated[list[TaskState], Meta(min_length=1, max_length=6)]
MetadataValue = str | int | float | bool | None
Limit = Annotated[int, Meta(ge=1, le=200, description="Maximum number of jobs.")]


class JobFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which jobs: those that match everything that is given.

    ``metadata`` compares the members of an object by name and value; numbers and booleans are
    compared as they are written in JSON. ``since`` and ``until`` are RFC 3339 times of acceptance:
    from ``since`` on, and before ``until``.
    """

    state: TaskState | States | None = None
    code: Text | None = None
    model: Text | None = None
    priority: Priority | None = None
    inferer: Text | None = None
    owner: Text | None = None
    via: Via | None = None
    retry_of: Text | None = None
    id: str | None = None
    metadata: Annotated[dict[str, MetadataValue], Meta(min_length=1, max_length=16)] | None = None
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.since, self.until)
        if self.id is not None and not _is_id_prefix(self.id):
            raise ValueError("`id` must be the id of a job, or its first characters, at least four")
        if isinstance(self.state, str):
            force_setattr(self, "state", [self.state])

    @property
    def is_empty(self) -> bool:
        return all(getattr(self, name) is None for name in JobFilter.__struct_fields__)


class JobQuery(
    JobFilter, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What ``GET /jobs`` and ``infer.jobs`` take."""

    sort: JobSort = "accepted"
    limit: Limit = PAGE
    cursor: Text | None = None


class DeadFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which dead letters, as `JobFilter`; ``since`` and ``until`` are of their end."""

    code: Text | None = None
    model: Text | None = None
    priority: Priority | None = None
    since: str | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.since, self.until)

    @property
    def is_empty(self) -> bool:
        return all(getattr(self, name) is None for name in self.__struct_fields__)

    def matches(self, letter: DeadLetterHead) -> bool:
        at = parse_timestamp(letter.at)
        return (
            all(
                getattr(self, name) in (None, getattr(letter, name))
                for name in ("code", "model", "priority")
            )
            and (self.since is None or at >= parse_timestamp(self.since))
            and (self.until is None or at < parse_timestamp(self.until))
        )


Ids = Annotated[list[JobId], Meta(min_length=1, max_length=200)]
AtMost = Annotated[int, Meta(ge=1, le=1000, description="Maximum number of them; default: 1000.")]


class BulkRequest(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Several jobs at once: ``ids``, or those that match ``where``, which is never empty."""

    ids: Ids | None = None
    where: JobFilter | None = None
    at_most: AtMost | None = None

    def __post_init__(self) -> None:
        _check_selection(self.ids, self.where, self.at_most)


class BulkDeadRequest(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Several dead letters at once, as `BulkRequest`."""

    ids: Ids | None = None
    where: DeadFilter | None = None
    at_most: AtMost | None = None

    def __post_init__(self) -> None:
        _check_selection(self.ids, self.where, self.at_most)


class NotDone(Struct, frozen=True, kw_only=True):
    id: str
    code: str
    message: str


class BulkReport(Struct, frozen=True, kw_only=True):
    """``matched`` is how many there were, ``left`` how many of them were left for another request
    by ``at_most``; of dead letters at least so many. The others are ``done``, or listed with the
    reason."""

    matched: int
    done: int
    not_done: list[NotDone]
    left: int


class ListedJob(Struct, frozen=True, kw_only=True):
    """A job in a list. ``waited_s`` is from its acceptance to the start of its last attempt,
    ``ran_s`` from there to its end. ``preview`` is the beginning of its last message or prompt;
    empty if requests are not kept.

    ``position`` and ``eta`` are those of ``/status``. Jobs on the queue have a ``position``; the
    first 50 of each model also have an ``eta``, if one can be computed."""

    id: str
    state: TaskState
    code: str | None
    model: str
    priority: Priority
    via: str | None
    owner: str
    attempts: int
    inferer: str | None
    queued_at: str
    started_at: str | None
    finished_at: str | None
    waited_s: float | None
    ran_s: float | None
    first_token_s: float | None
    tokens_per_s: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    retry_of: str | None
    preview: str
    metadata: Metadata
    position: int | UnsetType = UNSET
    eta: Eta | UnsetType = UNSET


class Coverage(Struct, frozen=True, kw_only=True):
    """How far lists reach: ``jobs`` are known, the oldest of them accepted at ``since``. They are
    not ``complete`` in the first seconds after a gateway has started, and while more jobs wait than
    fit its memory."""

    since: str | None
    jobs: int
    complete: bool


class JobPage(Struct, frozen=True, kw_only=True):
    """``total`` is how many jobs match, ``states`` how many jobs of each state there are in all,
    whatever the filter. ``cursor`` asks for the next page; null on the last."""

    jobs: list[ListedJob]
    cursor: str | None
    total: int
    states: dict[str, int]
    covers: Coverage


class RequestHead(Struct, frozen=True, kw_only=True):
    """What a list says of a request; the rest is not decoded."""

    queued_at: str | None = None
    via: Via | None = None
    metadata: Metadata | UnsetType = UNSET
    retry_of: str | None = None
    model: str | None = None
    preview: str = ""

    def __post_init__(self) -> None:
        check_times(self.queued_at)


class ResultHead(Struct, frozen=True, kw_only=True):
    """What a list says of a result; the rest, such as embeddings, is not decoded."""

    outcome: Literal["completed", "failed", "cancelled", "expired"]
    id: str
    model: str
    attempt: Count
    queued_at: str
    finished_at: str
    started_at: str | None = None
    inferer: str | None = None
    timings: Timings | None = None
    owner: str = PUBLIC
    metadata: Metadata | UnsetType = UNSET
    priority: Priority = "normal"
    retry_of: str | None = None
    via: str | None = None
    preview: str = ""
    code: str | None = None
    usage: Usage | None = None

    def __post_init__(self) -> None:
        check_times(self.queued_at, self.started_at, self.finished_at)


def _check_bounds(since: str | None, until: str | None) -> None:
    for name, time in (("since", since), ("until", until)):
        try:
            check_times(time)
        except ValueError:
            example = "2026-01-31T12:00:00Z"
            raise ValueError(
                f"`{name}` must be an RFC 3339 time with a zone, such as {example}"
            ) from None


def _check_selection(
    ids: list[str] | None, where: JobFilter | DeadFilter | None, at_most: int | None
) -> None:
    if (ids is None) == (where is None):
        raise ValueError("give either `ids` or `where`")
    if where is None and at_most is not None:
        raise ValueError("`at_most` applies only to `where`; leave it out")
    if where is not None and where.is_empty:
        names = ", ".join(type(where).__struct_fields__)
        raise ValueError(f"`where` must not be empty: give at least one of {names}")


_is_id_prefix = re.compile(ID_PREFIX.removesuffix("$")).fullmatch
_decode_members = msgspec.json.Decoder(dict[str, Any]).decode


def metadata_pairs(metadata: bytes | None) -> list[tuple[str, str]]:
    """The members of ``metadata`` that can be compared, by name, with their values as text; the
    first `MAX_MEMBERS`."""
    if metadata is None:
        return []
    try:
        members = _decode_members(metadata)
    except (ValueError, RecursionError):
        return []  # null
    pairs = (
        (name, value_text(value))
        for name, value in members.items()
        if value is None or isinstance(value, str | int | float)
    )
    return list(islice(pairs, MAX_MEMBERS))


def value_text(value: MetadataValue) -> str:
    """``value`` as a filter compares it."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def id_at(time: str) -> bytes:
    """The smallest id of a job that was accepted at ``time``."""
    milliseconds = int(parse_timestamp(time).timestamp() * 1000)
    return max(0, milliseconds).to_bytes(6, "big") + bytes(10)


TimelineEvent = Literal[
    "accepted", "started", "first_token", "returned", "lost", "attempt_failed", "result"
]


class TimelineEntry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened to a job, ``after_s`` seconds after the entry before it. ``lost``:
    the inferer died, or was away for longer than its lease; when is not known."""

    event: TimelineEvent
    at: str | None = None
    after_s: float | None = None
    attempt: int | None = None
    inferer: str | None = None
    via: str | None = None
    state: TaskState | None = None
    code: str | None = None
    message: str | None = None


RequestSource = Literal["queue", "kept", "dead"]


class JobDetails(Struct, frozen=True, kw_only=True):
    """A job with its request and what happened to it.

    ``request_from`` says where the request was found: in the queue, among the copies that are
    kept, or in its dead letter; null if nowhere. The timeline is not ``events_complete`` if the
    broker has deleted events: it keeps them for 48 hours, and fewer of many. ``dead``: whether
    there is a dead letter. ``retried_as`` is the job as which that was sent again.
    """

    status: JobStatus
    request: Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
    request_from: RequestSource | None
    timeline: list[TimelineEntry]
    events_complete: bool
    dead: bool
    retried_as: str | None
    trace_id: str | None
