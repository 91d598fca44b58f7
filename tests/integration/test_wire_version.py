"""What wire version 2 promises: announcements, retries that a gateway schedules, and what becomes
of messages and streams of version 1."""

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from typing import Literal

import pytest
from nats.js.api import RetentionPolicy, StreamConfig

from services.gateway.jobs import version_1
from services.gateway.jobs.retries import LONGEST_PAUSE, Retries
from services.gateway.jobs.version_1 import Version1Requests
from shared.broker.connection import Broker
from shared.broker.consumers import require_own_wire
from shared.broker.inferers import read_inferers
from shared.broker.results import read_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.errors import BrokerUnavailable, InvalidRequest, TopologyError, UnknownJob
from shared.job_ids import new_job_id
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_dead_letter, encode
from shared.wire.events import StateEvent
from shared.wire.inferers import InfererEntry
from shared.wire.requests import InferenceRequest, RetryRequest
from shared.wire.results import Failed
from tests.support.nats_client import flush
from tests.support.workers import put

REQUEST = InferenceRequest(task="complete", prompt="hi", max_tokens=3)
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def test_each_accepted_request_is_announced_once_and_without_its_body(queue: Broker) -> None:
    announced = await queue.nc.subscribe(subjects.ACCEPTED_WILDCARD)
    await flush(queue.nc)
    job_id = new_job_id()
    subject = subjects.request("tiny", job_id, "high", "ann")
    for _ in range(2):  # the second is a duplicate
        stored = await queue.publish_stored(
            subject, encode(REQUEST), {subjects.HEADER_MSG_ID: job_id}, 5
        )
    message = await announced.next_msg(5)
    assert (message.subject, message.data) == (subjects.accepted("tiny", job_id), b"")
    assert message.headers is not None
    assert message.headers["Nats-Subject"] == subject
    assert message.headers["Nats-Sequence"] == str(stored.seq)
    await flush(queue.nc)
    assert announced.pending_msgs == 0


async def test_a_request_on_a_subject_of_version_1_becomes_a_dead_letter(queue: Broker) -> None:
    """With the reason, for the client that waits for it, too; what is of this version stays."""
    job_id = new_job_id()
    inbox = queue.nc.new_inbox()
    replies = await queue.nc.subscribe(inbox)
    body = b'{"prompt":"hi","max_tokens":3}'
    await queue.publish_stored(
        f"infer.requests.tiny.low.{job_id}", body, {"Reply-To": inbox, **TRACE}, 5
    )
    ours = await put(queue, REQUEST)
    for _ in range(2):
        await Version1Requests(queue, 5).dead_letter_some()
    letter = await queue.subject_get(subjects.DEAD, subjects.dead("tiny", job_id))
    result = await read_result(queue, "tiny", job_id)
    assert letter is not None
    printed = decode_dead_letter(letter.data)
    assert (printed.code, printed.request, printed.priority) == (
        "invalid_request",
        body.decode(),
        "low",
    )
    assert "wire version 1" in printed.message
    assert letter.headers["traceparent"] == TRACE["traceparent"]
    assert isinstance(result, Failed)
    assert (result.code, result.message) == (printed.code, printed.message)
    assert json.loads((await replies.next_msg(5)).data)["message"] == printed.message
    info = await queue.js.stream_info(subjects.REQUESTS, subjects_filter=">")
    assert info.state.subjects == {subjects.request("tiny", ours): 1}


@pytest.mark.parametrize("size", [10, 900_000])
async def test_bytes_on_a_subject_of_version_1_become_a_dead_letter(
    queue: Broker, size: int
) -> None:
    """Whatever they are, also where they would not fit into a letter as text."""
    await queue.publish_stored("infer.requests.Not_Ours.odd.x", b"\xff" * size, {}, 5)
    await Version1Requests(queue, 5).dead_letter_some()
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 0
    assert (await queue.js.stream_info(subjects.DEAD)).state.messages == 1


async def _hold_streams_of_version_1(broker: Broker) -> None:
    await broker.js.add_stream(
        StreamConfig(
            name="REQUESTS",
            subjects=["infer.requests.*.*.*", "infer.schedule.*.*.*"],
            retention=RetentionPolicy.WORK_QUEUE,
            max_msgs_per_subject=1,
        )
    )


async def test_a_store_of_version_1_is_left_as_it_is(broker: Broker) -> None:
    """The gateway refuses to start: nothing there is changed, and the error says what to do."""
    await _hold_streams_of_version_1(broker)
    before = (await broker.js.stream_info("REQUESTS")).config
    with pytest.raises(TopologyError, match="let them run empty with that version"):
        await ensure_topology(broker, Topology(), ["tiny"])
    assert (await broker.js.stream_info("REQUESTS")).config == before
    assert len(await broker.js.streams_info()) == 1


async def test_an_inferer_takes_nothing_from_a_queue_of_version_1(broker: Broker) -> None:
    await require_own_wire(broker, "tiny")  # no stream is there yet
    await _hold_streams_of_version_1(broker)
    await require_own_wire(broker, "tiny")  # and no consumer
    await broker.js.add_consumer(
        "REQUESTS", durable_name="tiny", filter_subject="infer.requests.tiny.normal.*"
    )
    with pytest.raises(TopologyError, match="another version of Sluice"):
        await require_own_wire(broker, "tiny")


async def test_an_inferer_takes_jobs_from_a_queue_of_this_version(queue: Broker) -> None:
    async with asyncio.timeout(5):
        await require_own_wire(queue, "tiny")


async def publish_state(
    broker: Broker, job_id: str, state: Literal["started", "retrying"], attempt: int
) -> None:
    event = StateEvent(state=state, attempt=attempt, at=timestamp(broker.now()), inferer="first")
    await broker.publish_stored(subjects.state("tiny", job_id), encode(event), {}, 5)


class Waiting:
    """One request on the queue, whose first attempt has failed."""

    def __init__(self, job_id: str, sequence: int) -> None:
        self.job_id, self.sequence = job_id, sequence

    def retry(self, at: str, sequence: int | None = None) -> RetryRequest:
        return RetryRequest(sequence=sequence or self.sequence, attempt=1, at=at)


@pytest.fixture
async def waiting(queue: Broker) -> Waiting:
    job_id = new_job_id()
    headers = {subjects.HEADER_MSG_ID: job_id, "Deadline": timestamp(), **TRACE}
    subject = subjects.request("tiny", job_id, "high", "ann")
    stored = await queue.publish_stored(subject, encode(REQUEST), headers, 5)
    await publish_state(queue, job_id, "retrying", 1)
    return Waiting(job_id, stored.seq)


async def test_a_retry_is_the_request_as_it_was(queue: Broker, waiting: Waiting) -> None:
    """Owner, priority, deadline and trace; nothing of it comes from the inferer that asks."""
    at = timestamp(queue.now() + timedelta(seconds=90))
    asked = waiting.retry(at)
    retries = Retries(queue)
    for _ in range(2):  # asking again changes nothing
        assert (await retries.schedule("tiny", waiting.job_id, asked)).at == at
    subject = f"infer.schedule.tiny.high.ann.{waiting.job_id}"
    stored = await queue.subject_get(subjects.REQUESTS, subject)
    assert stored is not None
    assert stored.data == encode(REQUEST)
    assert stored.headers["Nats-Schedule"] == f"@at {at}"
    assert stored.headers["Nats-Schedule-Target"] == (
        f"infer.requests.tiny.high.ann.{waiting.job_id}"
    )
    assert stored.headers["traceparent"] == TRACE["traceparent"]
    assert "Deadline" in stored.headers


async def test_a_retry_comes_within_minutes_whatever_is_asked(
    queue: Broker, waiting: Waiting
) -> None:
    scheduled = await Retries(queue).schedule(
        "tiny", waiting.job_id, waiting.retry("2999-01-01T00:00:00.000000Z")
    )
    assert parse_timestamp(scheduled.at) <= queue.now() + LONGEST_PAUSE


async def test_nothing_but_the_job_itself_is_scheduled(queue: Broker, waiting: Waiting) -> None:
    """Not another job's request, nor that of another model, nor one of version 1, nor one that has
    left the queue."""
    other = await put(queue, REQUEST)
    at = timestamp(queue.now())
    retries = Retries(queue)
    for model, job_id in (("tiny", other), ("other", waiting.job_id)):
        with pytest.raises(InvalidRequest, match="is not a request of the job"):
            await retries.schedule(model, job_id, waiting.retry(at))
    old = await queue.publish_stored("infer.requests.tiny.low.x", b"{}", {}, 5)
    with pytest.raises(InvalidRequest, match="is not a request of the job"):
        await retries.schedule("tiny", "x", waiting.retry(at, old.seq))
    with pytest.raises(UnknownJob, match="not on the queue any more"):
        await retries.schedule("tiny", waiting.job_id, waiting.retry(at, waiting.sequence + 50))
    info = await queue.js.stream_info(subjects.REQUESTS, subjects_filter="infer.schedule.>")
    assert not info.state.subjects


async def test_a_retry_that_is_asked_for_too_late_does_not_replace_the_next_attempt(
    queue: Broker, waiting: Waiting
) -> None:
    """The inferer gave up waiting, the queue delivered the job again, and that attempt runs."""
    await publish_state(queue, waiting.job_id, "started", 2)
    with pytest.raises(InvalidRequest, match=r"attempt 1 of the job .* has not failed"):
        await Retries(queue).schedule("tiny", waiting.job_id, waiting.retry(timestamp(queue.now())))
    info = await queue.js.stream_info(subjects.REQUESTS, subjects_filter="infer.schedule.>")
    assert not info.state.subjects


async def _publish_raw(broker: Broker, subject: str, payload: bytes, reply: str = "") -> None:
    """As another client would: ours refuses such subjects."""
    headers = f"NATS/1.0\r\nReply-To: {reply}\r\n\r\n".encode() if reply else b"NATS/1.0\r\n\r\n"
    size = len(headers) + len(payload)
    command = f"HPUB {subject} {len(headers)} {size}\r\n".encode()
    await broker.nc._send_command(command + headers + payload + b"\r\n")
    await flush(broker.nc)


@pytest.mark.parametrize("job_id", ["x" * 3900, "*", ">"])
async def test_a_version_1_subject_that_no_letter_can_have_is_dropped(
    queue: Broker, job_id: str
) -> None:
    """It would end every gateway, or take the newest result of the model for its own."""
    inbox = queue.nc.new_inbox()
    replies = await queue.nc.subscribe(inbox)
    finished = new_job_id()
    await queue.publish_stored(subjects.result("tiny", finished), b"somebody's answer", {}, 5)
    await _publish_raw(queue, f"infer.requests.tiny.low.{job_id}", b"{}", inbox)
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 1
    await Version1Requests(queue, 5).dead_letter_some()
    await flush(queue.nc)
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 0
    assert replies.pending_msgs == 0


async def test_a_call_clears_a_bounded_number_of_version_1_requests(
    queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that keeps publishing them must not keep the gateway from all else."""
    monkeypatch.setattr(version_1, "PAGE", 2)
    for number in range(5):
        await queue.publish_stored(f"infer.requests.tiny.low.{number}", b"{}", {}, 5)
    await Version1Requests(queue, 5).dead_letter_some()
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 3


async def test_version_1_requests_that_cannot_be_stored_do_not_hold_up_the_others(
    queue: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than one call takes; they get their letters when there is room."""
    monkeypatch.setattr(version_1, "PAGE", 2)
    dead = (await queue.js.stream_info(subjects.DEAD)).config
    await queue.js.update_stream(replace(dead, max_msg_size=5000))
    for number, size in enumerate([6000, 6000, 6000, 10, 10]):
        await queue.publish_stored(f"infer.requests.tiny.low.{number}", b"x" * size, {}, 5)
    requests = Version1Requests(queue, 5)
    for _ in range(3):
        await requests.dead_letter_some()
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 3
    await queue.js.update_stream(dead)
    for _ in range(3):
        await requests.dead_letter_some()
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 0


async def test_a_request_of_an_unknown_priority_is_not_stored(queue: Broker) -> None:
    """No consumer would ever deliver it."""
    with pytest.raises(BrokerUnavailable):
        await queue.publish_stored("infer.requests.tiny.urgent.public.x", b"{}", {}, 0)
    assert (await queue.js.stream_info(subjects.REQUESTS)).state.messages == 0


@pytest.mark.parametrize(
    "subject",
    [
        "infer.requests.tiny.normal.public.*",
        "infer.requests.tiny.normal.*.x",
        "infer.requests.*.normal.public.x",
        f"infer.requests.tiny.normal.public.{'x' * 257}",
        f"infer.requests.tiny.normal.{'x' * 257}.x",
        "infer.requests.tiny.normal.public.>",
    ],
)
def test_a_pattern_or_a_long_part_is_not_the_subject_of_a_request(subject: str) -> None:
    with pytest.raises(ValueError, match="not the subject of a request"):
        subjects.RequestSubject.parse(subject)


def entry(inferer_id: str, **changes: object) -> dict[str, object]:
    claimed = {
        "id": inferer_id,
        "model": "tiny",
        "slots": 1,
        "host": "h",
        "threads": 1,
        "n_ctx": 512,
        "tasks": ["complete"],
        "started_at": timestamp(),
        "version": "1",
    }
    return {**claimed, **changes}


async def test_entries_that_cannot_be_true_are_not_believed(queue: Broker) -> None:
    """A model that is not its key's; more slots than there can be; a start in the future, with
    which it would be the youngest for ever, and its facts those of the model."""
    claims = {
        subjects.inferer("tiny", "real"): entry("real"),
        subjects.inferer("other", "foreign"): entry("foreign"),
        subjects.inferer("tiny", "another-id"): entry("x"),
        subjects.inferer("tiny", "huge"): entry("huge", slots=10**6),
        subjects.inferer("tiny", "late"): entry("late", started_at="2999-01-01T00:00:00.000000Z"),
        "$KV.INFERERS.version-1": entry("version-1"),
    }
    for subject, claimed in claims.items():
        await queue.js.publish(subject, json.dumps(claimed).encode())
    live, _ = await read_inferers(queue)
    assert [one.entry for one in live] == [
        InfererEntry(**claims[subjects.inferer("tiny", "real")])  # type: ignore[arg-type]
    ]
