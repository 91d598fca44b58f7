"""The table of jobs: SQLite in memory, filled from stored messages, searched by `query.py`.

It holds what a list shows and nothing that the broker does not hold. A job is added by whichever of
its messages is read first; its result is final. Every method blocks for milliseconds, and may be
called by one thread at a time.
"""

import re
import sqlite3
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from secrets import token_bytes
from typing import Any
from uuid import UUID

from msgspec import UNSET, Raw

from services.gateway.eta.position import QueuedJob
from services.gateway.listing.query import COLUMNS, Search
from services.gateway.listing.queues import Queues, queue_of
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage
from shared.job_ids import accepted_at
from shared.model_names import name_of
from shared.timestamps import milliseconds_between, parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.api import TaskState
from shared.wire.codecs import (
    Unreadable,
    decode_request_head,
    decode_result_head,
    decode_state_event,
    skip,
)
from shared.wire.fields import NO_METADATA
from shared.wire.listing import (
    LONGEST_VALUE,
    UNFINISHED,
    Coverage,
    JobPage,
    JobQuery,
    ListedJob,
    RequestHead,
    ResultHead,
    id_at,
    metadata_pairs,
)
from shared.wire.requests import priority_of

MAX_BYTES = 128 * 1024 * 1024
"""The maximum size of the table. If jobs have large metadata, fewer of them fit."""
PAGE_BYTES = 2 * 1024 * 1024
"""The maximum size of a page. With large metadata, a page has fewer jobs than its limit."""
PRUNE_SHARE = 20
"""Over a bound, one job in this many goes at once."""
COMMON_PAIRS = 1000
"""As many jobs with a member of metadata are many."""
MAX_EARLY = 10_000
"""States of jobs that have not been read yet."""

LAST_ID = id_at("9999-12-31T23:59:59Z")
_JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

SCHEMA = """
CREATE TABLE jobs (
    id BLOB PRIMARY KEY, state TEXT NOT NULL, code TEXT, model TEXT NOT NULL,
    priority TEXT NOT NULL, via TEXT, owner TEXT NOT NULL, attempts INTEGER NOT NULL, inferer TEXT,
    queued_at TEXT NOT NULL, started_at TEXT, finished_at TEXT,
    waited_s REAL, ran_s REAL, first_token_s REAL, tokens_per_s REAL,
    prompt_tokens INTEGER, completion_tokens INTEGER, retry_of TEXT, deadline TEXT,
    result INTEGER, preview TEXT NOT NULL, queue TEXT, sequence INTEGER, metadata BLOB
) WITHOUT ROWID;
CREATE INDEX results ON jobs (result) WHERE result IS NOT NULL;
CREATE INDEX states ON jobs (state, id, code, model, priority, inferer, owner, via);
CREATE INDEX models ON jobs (model);
CREATE INDEX priorities ON jobs (priority);
CREATE INDEX ways ON jobs (via);
CREATE INDEX owners ON jobs (owner);
CREATE INDEX inferers ON jobs (inferer);
CREATE INDEX codes ON jobs (code) WHERE code IS NOT NULL;
CREATE INDEX retries ON jobs (retry_of) WHERE retry_of IS NOT NULL;
CREATE INDEX queues ON jobs (queue, sequence) WHERE queue IS NOT NULL;
CREATE INDEX deadlines ON jobs (deadline) WHERE result IS NULL;
CREATE TABLE counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER added AFTER INSERT ON jobs BEGIN
    INSERT INTO counts VALUES (new.state, 1) ON CONFLICT (state) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER changed AFTER UPDATE OF state ON jobs WHEN old.state <> new.state BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = old.state;
    INSERT INTO counts VALUES (new.state, 1) ON CONFLICT (state) DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER deleted AFTER DELETE ON jobs BEGIN
    UPDATE counts SET jobs = jobs - 1 WHERE state = old.state;
END;
CREATE TABLE pairs (pair INTEGER, id BLOB, PRIMARY KEY (pair, id)) WITHOUT ROWID;
CREATE INDEX pairs_of ON pairs (id);
CREATE TRIGGER replaced AFTER UPDATE OF metadata ON jobs WHEN old.metadata IS NOT new.metadata BEGIN
    DELETE FROM pairs WHERE id = old.id;
END;
CREATE TRIGGER unpaired AFTER DELETE ON jobs BEGIN
    DELETE FROM pairs WHERE id = old.id;
END;
"""

STATES: dict[str, TaskState] = {
    "completed": "SUCCESS",
    "failed": "FAILURE",
    "expired": "FAILURE",
    "cancelled": "REVOKED",
}

ADD_REQUEST = """
INSERT INTO jobs (id, state, model, priority, via, owner, attempts, queued_at, retry_of, deadline,
    preview, metadata)
VALUES (?, 'PENDING', ?, ?, ?, ?, 0, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING
"""
SET_STATE = """
UPDATE jobs SET state = ?, attempts = ?, inferer = ?, started_at = ?, waited_s = ?
WHERE id = ? AND result IS NULL
"""
ADD_RESULT = """
INSERT INTO jobs (id, state, code, model, priority, via, owner, attempts, inferer, queued_at,
    started_at, finished_at, waited_s, ran_s, first_token_s, tokens_per_s, prompt_tokens,
    completion_tokens, retry_of, result, preview, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, code = excluded.code,
    model = excluded.model, priority = excluded.priority, via = coalesce(excluded.via, via),
    attempts = excluded.attempts, inferer = excluded.inferer, queued_at = excluded.queued_at,
    started_at = excluded.started_at, finished_at = excluded.finished_at,
    waited_s = excluded.waited_s, ran_s = excluded.ran_s, first_token_s = excluded.first_token_s,
    tokens_per_s = excluded.tokens_per_s, prompt_tokens = excluded.prompt_tokens,
    completion_tokens = excluded.completion_tokens, result = excluded.result,
    preview = excluded.preview, queue = NULL, sequence = NULL,
    metadata = coalesce(excluded.metadata, metadata)
"""


class JobIndex:
    def __init__(self, max_jobs: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        # So that nobody can choose two values that look like one.
        self._key = token_bytes(16)
        self._early: dict[bytes, StoredMessage] = {}
        self._forgotten: set[bytes] = set()
        """Jobs that have no result yet, for which there was no room."""
        # Another thread than that which creates it may use it, one at a time.
        self._table = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._table.executescript(SCHEMA)
        self._queues = Queues(self._table)

    def clear(self) -> None:
        """Forget everything."""
        self._table.executescript("DELETE FROM jobs; DELETE FROM pairs; DELETE FROM counts;")
        self._early.clear()
        self._forgotten.clear()

    @property
    def has_forgotten(self) -> bool:
        """Whether jobs that wait or run are missing, because there was no room for them."""
        return bool(self._forgotten)

    def add_requests(self, messages: Iterable[StoredMessage]) -> None:
        """Add jobs that wait or run; of those that are known, only the place changes."""
        rows, places = [], []
        for message in messages:
            try:
                subject = subjects.RequestSubject.parse(message.subject)
            except ValueError:
                continue
            if (key := _key(subject.job_id)) is None:
                continue
            head = decode_request_head.read(message.data, message.subject) or RequestHead()
            stored_at = timestamp(parse_timestamp(message.time))
            rows.append(
                (
                    key,
                    name_of(subject.model, head.model),
                    priority_of(subject.priority),
                    head.via,
                    subject.owner,
                    head.queued_at or stored_at,
                    head.retry_of,
                    _deadline(message),
                    head.preview,
                    _metadata(head),
                )
            )
            places.append((queue_of(subject), message.sequence, key))
        with self._table:
            self._table.execute("BEGIN")
            self._add(ADD_REQUEST, rows)
            self._queues.place(places)
        early, self._early = self._early, {}
        self.set_states(early.values())
        self._prune()

    def set_states(self, messages: Iterable[StoredMessage]) -> None:
        """Note the last states of jobs; those of jobs that are not known yet are kept for a
        moment. A finished job keeps its state."""
        with self._table:
            self._table.execute("BEGIN")
            for message in messages:
                event = decode_state_event.read(message.data, message.subject)
                key = _key(subjects.model_and_id(message.subject)[1])
                if event is None or key is None:
                    continue
                found = self._table.execute("SELECT queued_at FROM jobs WHERE id = ?", (key,))
                if (row := found.fetchone()) is None:
                    if len(self._early) < MAX_EARLY:
                        self._early[key] = message
                    continue
                state, started_at, waited_s = "PENDING", None, None
                if event.state == "retrying" or event.code is not None:
                    state = "RETRY"
                elif event.state == "started":
                    state, started_at = "STARTED", event.at
                    waited_s = milliseconds_between(row[0], event.at) / 1000
                self._table.execute(
                    SET_STATE,
                    (
                        state,
                        event.attempt - (event.state == "returned"),
                        event.inferer if state == "STARTED" else None,
                        started_at,
                        waited_s,
                        key,
                    ),
                )

    def add_results(self, messages: Iterable[StoredMessage]) -> None:
        """Note how jobs ended."""
        rows = []
        for message in messages:
            job_id = subjects.model_and_id(message.subject)[1]
            if (key := _key(job_id)) is None:
                continue
            head = _result_head(message)
            usage, timings = head.usage, head.timings
            rows.append(
                (
                    key,
                    STATES[head.outcome],
                    head.code,
                    head.model,
                    head.priority,
                    head.via,
                    head.owner,
                    head.attempt,
                    head.inferer,
                    head.queued_at,
                    head.started_at,
                    head.finished_at,
                    *_seconds(head),
                    timings and timings.tokens_per_s,
                    usage and usage.prompt_tokens,
                    usage and usage.completion_tokens,
                    head.retry_of,
                    message.sequence,
                    head.preview,
                    _metadata(head),
                )
            )
        with self._table:
            self._table.execute("BEGIN")
            self._add(ADD_RESULT, rows)
        self._forgotten.difference_update(row[0] for row in rows)
        self._prune()

    def drop_results_before(self, sequence: int) -> None:
        """Forget jobs whose results the broker has deleted."""
        self._delete("result < ?", sequence)

    def unfinished(self, before: str) -> list[str]:
        """The ids of jobs without a result that were accepted before a time."""
        places = ", ".join("?" * len(UNFINISHED))
        found = self._table.execute(
            f"SELECT id FROM jobs WHERE state IN ({places}) AND queued_at < ?",
            (*UNFINISHED, before),
        )
        return [_id(row[0]) for row in found] + [_id(key) for key in self._forgotten]

    def state_subjects(self) -> list[str]:
        """Where the states of jobs without a result are stored."""
        places = ", ".join("?" * len(UNFINISHED))
        found = self._table.execute(
            f"SELECT model, id FROM jobs WHERE state IN ({places})", UNFINISHED
        )
        return [subjects.state(model, _id(key)) for model, key in found]

    def drop_unfinished(self, job_ids: Iterable[str]) -> None:
        """Forget jobs that were deleted from the queue and will have no result."""
        for job_id in job_ids:
            key = _key(job_id)
            self._delete("id = ? AND result IS NULL", key)
            self._forgotten.discard(key)

    def late(self, now: str, overdue: str) -> list[str]:
        """The ids of jobs whose deadline passed: before ``now`` if they wait, before ``overdue`` if
        they run; 50 at most."""
        found = self._table.execute(
            "SELECT id FROM jobs WHERE result IS NULL AND deadline < ? "
            "AND (state <> 'STARTED' OR deadline < ?) LIMIT 50",
            (now, overdue),
        )
        return [_id(row[0]) for row in found]

    def page(self, query: JobQuery, is_complete: bool) -> JobPage:
        """Raises: InvalidRequest: the cursor is not one of such a list."""
        search = Search.of(query, self.pair, self.is_common)
        shown: list[Sequence[Any]] = []
        size, has_more = 0, False
        for row in self._table.execute(*search.page):
            if has_more := len(shown) == query.limit or size > PAGE_BYTES:
                break
            shown.append(row)
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
        states = dict(self._table.execute("SELECT state, jobs FROM counts WHERE jobs > 0"))
        oldest = self._table.execute("SELECT min(id) FROM jobs").fetchone()[0]
        jobs = sum(states.values())
        if query.cursor is None and not has_more:
            total = len(shown)
        elif query.is_empty:
            total = jobs
        else:
            (total,) = self._table.execute(*search.total).fetchone()
        return JobPage(
            jobs=[_listed(row) for row in shown],
            cursor=search.cursor(shown[-1]) if has_more else None,
            total=total,
            states=states,
            covers=Coverage(
                since=None if oldest is None else timestamp(accepted_at(_id(oldest))),
                jobs=jobs,
                complete=is_complete,
            ),
        )

    def queued(self, job_ids: Iterable[str], models: Iterable[ModelConsumers]) -> list[QueuedJob]:
        """See `Queues.find`."""
        return self._queues.find([key for key in map(_key, job_ids) if key], models)

    def first_queued(self, model: ModelConsumers, limit: int) -> list[QueuedJob]:
        """See `Queues.first`."""
        return self._queues.first(model, limit)

    def pair(self, name: str, value: str) -> int:
        """The number of a member of metadata."""
        text = f"{len(name)}:{name}{value}".encode("utf-8", "surrogatepass")
        return int.from_bytes(blake2b(text, digest_size=8, key=self._key).digest(), signed=True)

    def is_common(self, pair: int) -> bool:
        """Whether many jobs have this member of metadata: to look for it in each job that matches
        other filters takes less time then than to look up each job that has it."""
        found = "SELECT count(*) FROM (SELECT 1 FROM pairs WHERE pair = ? LIMIT ?)"
        return bool(self._table.execute(found, (pair, COMMON_PAIRS)).fetchone()[0] == COMMON_PAIRS)

    def _prune(self) -> None:
        """Over a bound, forget the oldest jobs; of those that wait or run only for the memory."""
        finished, figures = "SELECT count(*) FROM jobs WHERE result IS NOT NULL", {}
        (jobs,) = self._table.execute(finished).fetchone()
        for name in ("page_count", "freelist_count", "page_size"):
            (figures[name],) = self._table.execute(f"PRAGMA {name}").fetchone()
        used = (figures["page_count"] - figures["freelist_count"]) * figures["page_size"]
        if jobs > self._max_jobs:
            surplus = jobs - self._max_jobs + jobs // PRUNE_SHARE
            self._delete(
                "id IN (SELECT id FROM jobs WHERE result > 0 ORDER BY id LIMIT ?)", surplus
            )
        if used > self._max_bytes:
            (jobs,) = self._table.execute("SELECT count(*) FROM jobs").fetchone()
            surplus = jobs // PRUNE_SHARE + 1
            which = "SELECT id, result FROM jobs ORDER BY result IS NULL, id LIMIT ?"
            oldest = self._table.execute(which, (surplus,)).fetchall()
            self._forgotten.update(key for key, result in oldest if result is None)
            with self._table:
                self._table.execute("BEGIN")
                for key, _ in oldest:
                    self._delete("id = ?", key)

    def _add(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Add ``rows``, which begin with the key and end with the metadata."""
        for row in rows:
            if self._table.execute(statement, row).rowcount != 1:
                continue  # it is known
            pairs = [(self.pair(*pair), row[0]) for pair in metadata_pairs(row[-1])]
            self._table.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?)", pairs)

    def _delete(self, which: str, *values: object) -> None:
        self._table.execute(f"DELETE FROM jobs WHERE {which}", values)


def _key(job_id: str) -> bytes | None:
    """None if it is not the id of a job (`is_job_id`, which takes ten times as long): somebody has
    published it by hand."""
    if _JOB_ID.fullmatch(job_id) is None:
        return None
    key = bytes.fromhex(job_id.replace("-", ""))
    return key if key < LAST_ID else None


def _id(key: bytes) -> str:
    return str(UUID(bytes=key))


def _result_head(message: StoredMessage) -> ResultHead:
    """Like `decode_stored`. A result that is unreadable or of another job counts as failed."""
    model, job_id = subjects.model_and_id(message.subject)
    try:
        head = decode_result_head(message.data)
        if subjects.result(head.model, head.id) == message.subject:
            return head
        skip("result", message.subject, Unreadable("it is the result of another job"))
    except Unreadable as error:
        skip("result", message.subject, error)
    stored_at = timestamp(parse_timestamp(message.time))
    return ResultHead(
        outcome="failed",
        id=job_id,
        model=model,
        attempt=0,
        queued_at=stored_at,
        finished_at=stored_at,
        code="unreadable_result",
    )


def _deadline(message: StoredMessage) -> str | None:
    """None if it cannot be read: somebody has published it by hand."""
    try:
        return timestamp(parse_timestamp(message.headers.get(subjects.HEADER_DEADLINE, "")))
    except ValueError:
        return None


def _metadata(head: RequestHead | ResultHead) -> bytes | None:
    """The metadata as stored in a row. None if the job has none, or more than a gateway accepts,
    which is possible only for a request that was not published by a gateway."""
    metadata = head.metadata
    if metadata is UNSET or metadata == NO_METADATA or len(metadata) > LONGEST_VALUE:
        return None
    return bytes(metadata)


def _seconds(head: ResultHead) -> tuple[float | None, float | None, float | None]:
    """How long the job waited, ran, and took to its first token."""
    if head.started_at is None:
        return milliseconds_between(head.queued_at, head.finished_at) / 1000, None, None
    waited_ms = milliseconds_between(head.queued_at, head.started_at)
    ran_ms = milliseconds_between(head.started_at, head.finished_at)
    timings = head.timings
    if timings is None:
        return waited_ms / 1000, ran_ms / 1000, None
    first_ms = timings.first_token_ms
    if timings.total_ms is not None:
        ran_ms = timings.total_ms
    return timings.queued_ms / 1000, ran_ms / 1000, None if first_ms is None else first_ms / 1000


def _listed(row: Sequence[Any]) -> ListedJob:
    found = dict(zip(COLUMNS, row[:-1], strict=True))
    metadata = found["metadata"]
    return ListedJob(
        **{
            **found,
            "id": _id(found["id"]),
            "metadata": NO_METADATA if metadata is None else Raw(metadata),
        }
    )
