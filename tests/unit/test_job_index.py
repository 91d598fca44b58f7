"""The index of jobs: what it makes of stored messages, and how it is searched."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from nats.js.api import ConsumerConfig, ConsumerInfo, SequenceInfo

from services.gateway.jobs.preview import preview_of
from services.gateway.listing.index import COMMON_PAIRS, PAGE_BYTES, JobIndex
from services.gateway.listing.query import Search
from services.gateway.validation.listing import parse_query
from shared.broker.consumers import ModelConsumers
from shared.broker.stored_messages import StoredMessage
from shared.errors import InvalidRequest
from shared.job_ids import new_job_id
from shared.model_names import token_of
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.api import JobSubmission
from shared.wire.codecs import encode
from shared.wire.events import StateEvent
from shared.wire.listing import JobPage, JobQuery, ListedJob
from shared.wire.requests import InferenceRequest
from shared.wire.results import Cancelled, Completed, Failed, Timings, Usage

BEGINNING = datetime(2026, 1, 31, 12, tzinfo=UTC)
NUL = "\0"


class Filled:
    """An index with jobs that are accepted one second after another."""

    def __init__(self, **bounds: int) -> None:
        self.index = JobIndex(**{"max_jobs": 1000, **bounds})
        self._second = 0
        self._sequence = 0

    def accept(self, priority: str = "normal", model: str = "tiny", **fields: Any) -> str:
        at = BEGINNING + timedelta(seconds=self._second)
        self._second += 1
        job_id = new_job_id(at)
        request = InferenceRequest(
            **{"task": "complete", "prompt": "x", "queued_at": timestamp(at), "via": "http"}
            | fields
        )
        self.index.add_requests(
            [self.message(subjects.request(model, job_id, priority), encode(request))]
        )
        return job_id

    def change(self, job_id: str, state: str, attempt: int = 1, **fields: Any) -> None:
        event = StateEvent(
            state=state,  # type: ignore[arg-type]
            attempt=attempt,
            at=timestamp(BEGINNING + timedelta(minutes=1)),
            inferer="inferer-1",
            **fields,
        )
        self.index.set_states([self.message(subjects.state("tiny", job_id), encode(event))])

    def end(self, job_id: str, kind: Any = Completed, **fields: Any) -> None:
        defaults: dict[Any, dict[str, Any]] = {
            Completed: {
                "text": "",
                "finish_reason": "stop",
                "usage": Usage(prompt_tokens=3, completion_tokens=5, total_tokens=8),
            },
            Failed: {"code": "model_error", "message": ""},
            Cancelled: {"code": "cancelled", "message": ""},
        }
        result = kind(
            **{
                "id": job_id,
                "model": "tiny",
                "attempt": 1,
                "queued_at": timestamp(BEGINNING),
                "finished_at": timestamp(BEGINNING + timedelta(hours=1)),
                "inferer": "inferer-1",
            }
            | defaults[kind]
            | fields
        )
        self.index.add_results(
            [self.message(subjects.result(result.model, job_id), encode(result))]
        )

    def message(self, subject: str, data: bytes) -> StoredMessage:
        self._sequence += 1
        return StoredMessage(subject, self._sequence, timestamp(BEGINNING), {}, data)

    def page(self, **query: Any) -> JobPage:
        return self.index.page(JobQuery(**query), is_complete=True)

    def ids(self, **query: Any) -> list[str]:
        return [job.id for job in self.page(**query).jobs]

    def job(self, job_id: str) -> ListedJob:
        (found,) = self.page(id=job_id).jobs
        return found


@pytest.fixture
def filled() -> Filled:
    return Filled()


def test_a_job_is_followed_from_its_request_to_its_result(filled: Filled) -> None:
    """Its states are those that `/status` shows."""
    job_id = filled.accept(preview="Name three", metadata=msgspec.Raw(b'{"user": "u7"}'))
    assert filled.job(job_id).state == "PENDING"
    assert (filled.job(job_id).preview, filled.job(job_id).via) == ("Name three", "http")
    filled.change(job_id, "started")
    started = filled.job(job_id)
    assert (started.state, started.inferer, started.waited_s) == ("STARTED", "inferer-1", 60.0)
    filled.change(job_id, "returned")
    assert (filled.job(job_id).state, filled.job(job_id).attempts) == ("PENDING", 0)
    filled.change(job_id, "retrying", code="model_error")
    assert (filled.job(job_id).state, filled.job(job_id).attempts) == ("RETRY", 1)
    timings = Timings(queued_ms=1500, first_token_ms=200, total_ms=2500, tokens_per_s=80.0)
    filled.end(job_id, started_at=timestamp(BEGINNING), timings=timings, preview="Name three")
    ended = filled.job(job_id)
    assert (ended.state, ended.code, ended.finished_at is not None) == ("SUCCESS", None, True)
    assert (ended.waited_s, ended.ran_s, ended.first_token_s) == (1.5, 2.5, 0.2)
    assert (ended.prompt_tokens, ended.completion_tokens, ended.tokens_per_s) == (3, 5, 80.0)
    assert ended.via == "http", "an inferer of an earlier version does not report it"


def test_the_order_in_which_messages_are_read_does_not_matter(filled: Filled) -> None:
    """The three streams are read one after another: a state may come before its request, and a
    request or a state after the result."""
    early, late = new_job_id(BEGINNING), new_job_id(BEGINNING)
    filled.change(early, "started")
    assert filled.page().total == 0
    request = encode(InferenceRequest(task="complete", prompt="x"))
    filled.index.add_requests([filled.message(subjects.request("tiny", early), request)])
    assert filled.job(early).state == "STARTED"
    filled.end(late, Failed)
    filled.index.add_requests([filled.message(subjects.request("tiny", late), request)])
    filled.change(late, "started")
    assert (filled.job(late).state, filled.job(late).code) == ("FAILURE", "model_error")


def test_each_filter_and_several_together(filled: Filled) -> None:
    done = filled.accept(via="cli", metadata=msgspec.Raw(b'{"user":"u1","n":7,"on":true}'))
    failed = filled.accept(priority="high", metadata=msgspec.Raw(b'{"user":"u1","n":"7"}'))
    waiting = filled.accept(model="org/name", priority="low", retry_of=done)
    filled.end(done, metadata=msgspec.Raw(b'{"user":"u1","n":7,"on":true}'), via="cli")
    filled.end(failed, Failed, metadata=msgspec.Raw(b'{"user":"u1","n":"7"}'), priority="high")
    assert filled.ids() == [waiting, failed, done]
    assert filled.ids(state="FAILURE") == [failed]
    assert filled.ids(state=["FAILURE", "PENDING"]) == [waiting, failed]
    assert filled.ids(code="model_error") == [failed]
    assert filled.ids(priority="low") == [waiting]
    assert filled.ids(via="cli") == [done]
    assert filled.ids(inferer="inferer-1") == [failed, done]
    assert filled.ids(owner="public") == [waiting, failed, done]
    assert filled.ids(retry_of=done) == [waiting]
    assert filled.ids(id=failed[:13]) == [waiting, failed, done][1:2]
    assert filled.ids(metadata={"user": "u1"}) == [failed, done]
    assert filled.ids(metadata={"user": "u1", "on": True}) == [done]
    assert filled.ids(metadata={"n": 7}) == filled.ids(metadata={"n": "7"}) == [failed, done]
    assert filled.ids(metadata={"user": "u2"}) == filled.ids(metadata={"u": "1"}) == []
    second = timestamp(BEGINNING + timedelta(seconds=1))
    assert filled.ids(since=second) == [waiting, failed]
    assert filled.ids(until=second) == [done]
    assert filled.ids(state="SUCCESS", metadata={"user": "u1"}, via="cli") == [done]
    assert filled.ids(state="SUCCESS", priority="high") == []


@pytest.mark.parametrize(
    "given",
    [
        {"model": "tiny"},
        {"priority": "high"},
        {"inferer": "inferer-1"},
        {"owner": "public"},
        {"via": "http"},
        {"model": "tiny", "priority": "high", "via": "http"},
    ],
)
def test_filters_beside_a_state_read_only_the_index_of_states(
    filled: Filled, given: dict[str, Any]
) -> None:
    """Looking up each job of a state, or of a priority, takes longer the more of them there are."""
    search = Search.of(
        JobQuery(state="PENDING", **given), filled.index.pair, filled.index.is_common
    )
    for statement, values in (search.page, search.total):
        plan = filled.index._table.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
        read = [row[3] for row in plan if row[3].startswith(("SCAN jobs", "SEARCH jobs"))]
        assert read[-1].startswith("SEARCH jobs USING COVERING INDEX states")


@pytest.mark.parametrize(
    ("given", "is_common", "read"),
    [
        ({"priority": "high", "via": "http"}, False, "SCAN jobs USING COVERING INDEX states"),
        ({"metadata": {"app": "shop"}}, False, "SEARCH pairs USING PRIMARY KEY (pair=?)"),
        (
            {"metadata": {"app": "shop"}, "priority": "high"},
            False,
            "SEARCH jobs USING PRIMARY KEY (id=?)",
        ),
        (
            {"metadata": {"app": "shop"}, "priority": "high"},
            True,
            "SEARCH jobs USING COVERING INDEX priorities (priority=?)",
        ),
    ],
)
def test_where_jobs_are_searched(
    filled: Filled, given: dict[str, Any], is_common: bool, read: str
) -> None:
    """What few jobs have comes first; then what an index answers alone."""
    search = Search.of(JobQuery(**given), filled.index.pair, lambda _: is_common)
    statement, values = search.total
    plan = filled.index._table.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
    assert plan[0][3] == read


@pytest.mark.parametrize("name", ["' OR 1=1 --", "$.user", NUL, "user", "ü", "x" * 5000])
def test_names_and_values_of_metadata_are_only_compared(filled: Filled, name: str) -> None:
    """Whatever they contain."""
    job_id = filled.accept(metadata=msgspec.Raw(encode({name: name})))
    filled.accept(metadata=msgspec.Raw(encode({"other": name, name: "other"})))
    assert filled.ids(metadata={name: name}) == [job_id]


@pytest.mark.parametrize("sort", ["accepted", "finished", "waited", "ran", "tokens"])
def test_pages_have_every_job_once_while_jobs_arrive(filled: Filled, sort: Any) -> None:
    """In the same order as one long page, whatever is accepted between two pages."""
    ids = [filled.accept() for _ in range(25)]
    for number, job_id in enumerate(ids[:15]):
        at = timestamp(BEGINNING + timedelta(minutes=number % 4))
        timings = Timings(queued_ms=number % 3, total_ms=number % 5)
        filled.end(job_id, timings=timings, started_at=at, finished_at=at)
    expected = filled.ids(sort=sort, limit=200)
    found: list[str] = []
    cursor = None
    while True:
        page = filled.page(sort=sort, limit=7, cursor=cursor)
        found += [job.id for job in page.jobs if job.id in ids]
        filled.accept()
        if (cursor := page.cursor) is None or len(found) >= 25:
            break
    assert found == expected
    assert sorted(found) == sorted(ids)


@pytest.mark.parametrize("cursor", ["x", "00", "zz", "a" * 2000, "93a8"])
def test_a_cursor_that_is_none_is_refused(filled: Filled, cursor: str) -> None:
    filled.accept()
    with pytest.raises(InvalidRequest, match="cursor must be"):
        filled.page(cursor=cursor)


def test_a_cursor_is_of_one_order(filled: Filled) -> None:
    filled.accept()
    filled.accept()
    cursor = filled.page(limit=1).cursor
    with pytest.raises(InvalidRequest, match="cursor must be"):
        filled.page(sort="waited", cursor=cursor)


def test_counts_are_of_the_filter_and_of_the_whole(filled: Filled) -> None:
    ids = [filled.accept() for _ in range(5)]
    filled.end(ids[0])
    filled.end(ids[1], Failed)
    filled.end(ids[2], Cancelled)
    page = filled.page(state="PENDING", limit=1)
    assert (page.total, len(page.jobs)) == (2, 1)
    assert page.states == {"SUCCESS": 1, "FAILURE": 1, "REVOKED": 1, "PENDING": 2}
    assert page.covers.since == timestamp(BEGINNING)
    assert page.covers.jobs == 5


def test_over_its_bound_the_oldest_finished_jobs_go_first() -> None:
    """A job that waits is listed as long as it waits, however many have finished since."""
    filled = Filled(max_jobs=100)
    waiting = filled.accept()
    ended = []
    for _ in range(300):
        ended.append(filled.accept())
        filled.end(ended[-1], metadata=msgspec.Raw(b'{"of": "all"}'))
    found = filled.ids(limit=200)
    assert 50 < len(found) <= 101
    assert waiting in found
    assert found[:-1] == ended[::-1][: len(found) - 1]
    assert filled.page(metadata={"of": "all"}).total == len(found) - 1, "no more pairs than jobs"


def test_common_metadata_is_found_like_any(filled: Filled) -> None:
    """Alone, with other members, with other filters, in any order, on later pages."""
    ids = []
    for number in range(COMMON_PAIRS + 10):
        members = {"app": "shop", "parity": number % 2, "number": number}
        ids.append(filled.accept(metadata=msgspec.Raw(encode(members))))
    for job_id in ids[:100]:
        filled.end(job_id)
    other = filled.accept(metadata=msgspec.Raw(b'{"app": "other"}'))
    newest = ids[::-1]
    shop = {"app": "shop"}
    assert filled.page(metadata=shop).total == len(ids)
    assert filled.ids(metadata=shop, limit=3) == newest[:3]
    assert filled.ids(metadata=shop | {"number": 7}) == [ids[7]]
    assert filled.ids(metadata={"number": 7} | shop) == [ids[7]]
    assert filled.page(metadata=shop | {"parity": 1}).total == len(ids) // 2
    assert filled.ids(metadata=shop, id=ids[5]) == [ids[5]]
    assert filled.ids(metadata=shop, id=other) == []
    for sort in ("accepted", "finished"):
        done = filled.page(metadata=shop, state="SUCCESS", sort=sort, limit=200)
        assert {job.id for job in done.jobs} == set(ids[:100])
        assert done.total == 100
        first = filled.page(metadata=shop, sort=sort, limit=100)
        second = filled.page(metadata=shop, sort=sort, limit=100, cursor=first.cursor)
        assert len({job.id for job in [*first.jobs, *second.jobs]}) == 200
        assert first.total == second.total == len(ids)


def test_large_metadata_makes_the_list_shorter() -> None:
    """The memory of a gateway is bounded, whatever clients send."""
    filled = Filled(max_bytes=1024 * 1024)
    for _ in range(300):
        filled.end(filled.accept(), metadata=msgspec.Raw(encode({"x": "y" * 16_000})))
    assert 20 < filled.page().total < 80


def test_a_result_without_metadata_leaves_what_the_request_said(filled: Filled) -> None:
    """What is shown is what is found; a request that is read after its result adds nothing."""
    job_id = filled.accept(metadata=msgspec.Raw(b'{"user": "u1"}'))
    filled.end(job_id)
    assert filled.job(job_id).metadata == msgspec.Raw(b'{"user": "u1"}')
    assert filled.ids(metadata={"user": "u1"}) == [job_id]
    filled.end(job_id, metadata=msgspec.Raw(b'{"user": "u2"}'))
    assert filled.ids(metadata={"user": "u1"}) == []
    assert filled.ids(metadata={"user": "u2"}) == [job_id]

    late = new_job_id(BEGINNING)
    filled.end(late)
    request = InferenceRequest(task="complete", prompt="x", metadata=msgspec.Raw(b'{"n": 1}'))
    filled.index.add_requests([filled.message(subjects.request("tiny", late), encode(request))])
    assert filled.job(late).metadata == msgspec.Raw(b"null")
    assert filled.ids(metadata={"n": 1}) == []


def test_results_without_metadata_do_not_empty_the_list() -> None:
    """Whatever is deleted takes its members of metadata along."""
    filled = Filled(max_jobs=20, max_bytes=256 * 1024)
    for _ in range(300):
        members = {f"k{number}": number for number in range(30)}
        filled.end(filled.accept(metadata=msgspec.Raw(encode(members))))
    assert filled.page().total >= 19


def test_many_members_of_metadata_are_not_all_indexed(filled: Filled) -> None:
    """A job costs no more than others, whatever its caller sends."""
    members = {f"k{number}": number for number in range(1200)}
    job_id = filled.accept(metadata=msgspec.Raw(encode(members)))
    assert filled.ids(metadata={"k31": 31}) == [job_id]
    assert filled.ids(metadata={"k32": 32}) == []
    assert filled.job(job_id).metadata == msgspec.Raw(encode(members))


def test_a_list_without_room_for_a_waiting_job_says_so() -> None:
    """Until that has ended, or was deleted from the queue."""
    filled = Filled(max_bytes=512 * 1024)
    metadata = msgspec.Raw(encode({"x": "y" * 16_000}))
    ids = [filled.accept(metadata=metadata) for _ in range(20)]
    assert not filled.index.has_forgotten
    while not filled.index.has_forgotten:
        ids.append(filled.accept(metadata=metadata))
    later = timestamp(BEGINNING + timedelta(hours=1))
    assert set(filled.index.unfinished(later)) == set(ids)
    first, second, *_ = (job_id for job_id in ids if not filled.ids(id=job_id))
    filled.index.drop_unfinished([first])
    assert filled.index.has_forgotten
    for job_id in ids[1:]:
        filled.end(job_id)
    assert second not in filled.ids(state="PENDING")
    assert not filled.index.has_forgotten


def test_what_the_broker_has_deleted_is_forgotten(filled: Filled) -> None:
    """Results that have expired, and jobs that were deleted from the queue."""
    first, second, deleted = (filled.accept() for _ in range(3))
    filled.end(first)
    filled.end(second)
    sequence = filled._sequence
    filled.index.drop_results_before(sequence)
    assert filled.ids() == [deleted, second]
    later = timestamp(BEGINNING + timedelta(hours=1))
    assert filled.index.unfinished(later) == [deleted]
    filled.index.drop_unfinished([deleted, second])
    assert filled.ids() == [second]


def test_a_deadline_that_cannot_be_read_keeps_no_job_from_expiring(filled: Filled) -> None:
    """However many there are; any RFC 3339 time is compared as the time it is."""
    request = encode(InferenceRequest(task="complete", prompt="x"))

    def accept(deadline: str) -> str:
        job_id = new_job_id(BEGINNING)
        message = filled.message(subjects.request("tiny", job_id), request)
        headers = {subjects.HEADER_DEADLINE: deadline}
        filled.index.add_requests([replace(message, headers=headers)])
        return job_id

    for text in ("", "0", "2026-01-31", "1 o'clock"):
        for _ in range(20):
            accept(text)
    late = accept("2026-01-31T12:30:00+01:00")
    accept("2026-01-31T11:30:00-01:00")
    now = timestamp(BEGINNING)
    assert filled.index.late(now, now) == [late]


def test_a_page_is_bounded_in_bytes(filled: Filled) -> None:
    """Large jobs make more pages, which have every job once."""
    metadata = msgspec.Raw(encode({"x": "y" * 16_000}))
    ids = [filled.accept(metadata=metadata) for _ in range(150)]
    found: list[str] = []
    page = filled.page(limit=200)
    while page.cursor is not None:
        assert len(encode(page)) < 1.1 * PAGE_BYTES
        found += [job.id for job in page.jobs]
        page = filled.page(limit=200, cursor=page.cursor)
    assert [*found, *(job.id for job in page.jobs)] == ids[::-1]
    assert len(found) > 50


def test_metadata_that_no_gateway_accepts_is_not_listed(filled: Filled) -> None:
    job_id = filled.accept(metadata=msgspec.Raw(encode({"x": "y" * 17_000})))
    assert filled.job(job_id).metadata == msgspec.Raw(b"null")


def test_what_cannot_be_read_fails_as_its_status_says(filled: Filled) -> None:
    """A result of bytes is a failure; a request of bytes is listed, as its inferer has to say what
    is wrong with it; what has no id of a job is nothing."""
    broken, odd, other = (new_job_id(BEGINNING) for _ in range(3))
    result = encode(Failed(
        id=other, model="tiny", attempt=1, queued_at=timestamp(), finished_at=timestamp(),
        code="x", message="",
    ))  # fmt: skip
    filled.index.add_results(
        [
            filled.message(subjects.result("tiny", broken), b"\xff"),
            filled.message(subjects.result("tiny", "by-hand"), result),
            filled.message(subjects.result("tiny", odd), result),
        ]
    )
    assert {filled.job(job_id).code for job_id in (broken, odd)} == {"unreadable_result"}
    filled.index.add_requests(
        [
            filled.message(subjects.request("tiny", other), b'{"queued_at": 7}'),
            filled.message(subjects.request("tiny", "by-hand"), b"{}"),
        ]
    )
    assert filled.page().total == 3
    assert filled.job(other).state == "PENDING"
    filled.index.set_states([filled.message(subjects.state("tiny", other), b"[[]")])


@pytest.mark.parametrize(
    ("parameters", "param", "why"),
    [
        ({"stat": "PENDING"}, "stat", "give state, code, model,"),
        ({"metadata": "x"}, "metadata", "metadata.<name>"),
        ({"state": "DONE"}, "state", "state must be FAILURE or PENDING or RETRY"),
        ({"limit": "201"}, "limit", "at most 200"),
        ({"limit": "many"}, "limit", "a whole number"),
        ({"sort": "newest"}, "sort", "accepted or finished or ran or tokens or waited"),
        ({"priority": "urgent"}, "priority", "high or low or normal"),
        ({"priority": "null"}, "priority", "high or low or normal"),
        ({"via": "null"}, "via", "must be"),
        ({"model": ""}, "model", "not be empty"),
        ({"id": "019"}, "id", "`id` must be the id of a job, or its first characters"),
        ({"since": "yesterday"}, "since", "`since` must be an RFC 3339 time"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(
    parameters: dict[str, str], param: str | None, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=r".") as raised:
        parse_query(parameters.items())
    assert why in raised.value.message
    assert raised.value.param == param


def test_a_parameter_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"metadata\.a is given twice"):
        parse_query([("metadata.a", "1"), ("metadata.a", "2")])


def test_the_preview_is_the_beginning_of_what_is_asked() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "  Name\n three " + "x" * 200},
    ]
    chat = msgspec.convert({"messages": messages}, JobSubmission)
    assert preview_of(chat) == ("Name three " + "x" * 200)[:80]
    assert preview_of(JobSubmission(prompt="Once")) == "Once"
    assert preview_of(JobSubmission(input=["a", "b"])) == "a"
    assert preview_of(JobSubmission(input=[[1, 2]])) == ""
    assert preview_of(JobSubmission(query="q", documents=["d"])) == "q"


def consumers(token: str = "tiny", delivered: int = 0) -> ModelConsumers:
    """A model with all priorities, of whose queues all up to ``delivered`` was delivered."""
    return ModelConsumers(
        token,
        {
            priority: ConsumerInfo(
                name=subjects.consumer(token, priority),
                stream_name=subjects.REQUESTS,
                config=ConsumerConfig(),
                created=BEGINNING,
                delivered=SequenceInfo(consumer_seq=delivered, stream_seq=delivered),
            )
            for priority in subjects.PRIORITIES
        },
    )


def between(filled: Filled, *job_ids: str, delivered: int = 0) -> list[int | None]:
    """How many jobs of its own queue each of the jobs has before it, in the given order."""
    models = consumers(delivered=delivered), consumers("other", delivered)
    found = filled.index.queued(job_ids, models)
    return [{job.request.job_id: job.between for job in found}[job_id] for job_id in job_ids]


def test_jobs_are_counted_in_their_own_queue(filled: Filled) -> None:
    """Whichever of them a page shows."""
    normal = [filled.accept() for _ in range(4)]
    high, other = filled.accept("high"), filled.accept(model="other")
    normal += [filled.accept() for _ in range(3)]
    assert between(filled, *normal) == [*range(7)]
    assert between(filled, high, normal[6], normal[2], other) == [0, 6, 2, 0]
    assert filled.index.queued([high], [consumers("third")]) == []


def test_what_runs_or_has_ended_is_not_on_the_queue(filled: Filled) -> None:
    """What was delivered and does not run is, before all that waits."""
    running, returned, *waiting = [filled.accept() for _ in range(5)]
    filled.change(running, "started")
    filled.change(returned, "returned")
    filled.end(waiting[1], Cancelled)
    assert between(filled, waiting[2], returned, waiting[0], delivered=2) == [1, None, 0]
    assert filled.index.queued([running, waiting[1]], [consumers()]) == []
    first = filled.index.first_queued(consumers(delivered=2), limit=2)
    assert [(job.request.job_id, job.between) for job in first] == [
        (returned, None),
        (waiting[0], 0),
    ]


def test_the_first_jobs_are_in_the_order_of_delivery(filled: Filled) -> None:
    low, normal, high = (filled.accept(priority) for priority in ("low", "normal", "high"))
    for limit in (1, 2, 3, 9):
        first = filled.index.first_queued(consumers(), limit)
        assert [job.request.job_id for job in first] == [high, normal, low][:limit]
        assert {job.request.priority for job in first} <= set(subjects.PRIORITIES)
    assert filled.index.first_queued(consumers("other"), limit=3) == []


def test_a_retry_leaves_the_queue_and_comes_back_at_its_end(filled: Filled) -> None:
    job_id, other = filled.accept(), filled.accept()
    request = subjects.RequestSubject("tiny", "normal", "public", job_id)
    filled.change(job_id, "retrying", code="model_error")
    filled.index.add_requests([filled.message(request.schedule, b"{}")])
    assert filled.index.queued([job_id], [consumers()]) == []
    filled.index.add_requests([filled.message(request.request, b"{}")])
    assert between(filled, other, job_id) == [0, 1]


def test_names_of_one_token_share_a_queue(filled: Filled) -> None:
    """A request without a readable name is listed under the token."""
    name = "org/name"
    token = token_of(name)
    first, second = filled.accept(model=token), filled.accept(model=name)
    found = filled.index.queued([first, second], [consumers(token)])
    assert [(job.request.job_id, job.between) for job in found] == [(first, 0), (second, 1)]
