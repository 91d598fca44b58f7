"""Whatever somebody puts on the broker: no reader of it ends, and the others are read."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.state.fleet import Fleet
from shared.broker.connection import Broker
from shared.broker.consumers import read_model
from shared.broker.inferers import read_inferers
from shared.broker.results import decode_stored, find_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.job_ids import new_job_id
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import codecs, subjects
from shared.wire.codecs import Decoder, Unreadable, encode
from shared.wire.inferers import InfererEntry
from tests.support.nats_client import flush

NOW = timestamp()
JOB = new_job_id()
WORK = {"prompt_bytes": 3, "max_tokens": 5, "task": "complete"}
RUNNING = {"id": JOB, "attempt": 1, "started_at": NOW, "completion_tokens": 1, "max_tokens": 2}
ENTRY: dict[str, Any] = {
    "id": "a",
    "model": "tiny",
    "slots": 1,
    "host": "h",
    "threads": 1,
    "n_ctx": 512,
    "tasks": ["chat", "complete"],
    "started_at": NOW,
    "version": "1",
    "cpus": [0],
    "idle_since": NOW,
    "jobs": [RUNNING],
}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
OUTCOME = {"id": JOB, "model": "tiny", "attempt": 1, "queued_at": NOW, "finished_at": NOW}
COMPLETED = {
    **OUTCOME,
    "outcome": "completed",
    "text": "x",
    "finish_reason": "stop",
    "usage": USAGE,
    "timings": {"queued_ms": 1.0, "prompt_ms": 2.0},
    "work": WORK,
    "started_at": NOW,
}
LETTER = {
    "id": JOB,
    "model": "tiny",
    "code": "c",
    "message": "m",
    "attempts": 1,
    "at": NOW,
    "request": "{}",
}
EVENT = {"state": "started", "attempt": 1, "at": NOW, "inferer": "a", "work": WORK}

KINDS: dict[str, tuple[Decoder[Any], dict[str, Any]]] = {
    "request": (
        codecs.decode_request,
        {"task": "complete", "prompt": "hi", "max_tokens": 5, "queued_at": NOW},
    ),
    "result": (codecs.decode_result, COMPLETED),
    "state event": (codecs.decode_state_event, EVENT),
    "token frame": (codecs.decode_token_frame, {"attempt": 1, "index": 0, "tokens": ["a"]}),
    "cancel": (codecs.decode_cancel_notice, {"code": "cancelled"}),
    "key": (codecs.decode_idempotency_entry, {"id": JOB, "digest": "d"}),
    "letter": (codecs.decode_dead_letter, LETTER),
    "order": (codecs.decode_concurrency, {"concurrency": 1}),
    "inferer": (codecs.decode_inferer_entry, ENTRY),
    "facts": (codecs.decode_model_facts, {"n_ctx": 512, "tasks": ["chat"]}),
}

NOT_NUMBERS: tuple[object, ...] = (10**400, -1, 1e300, -(2**63), "1", None, [], True)
NOT_TIMES = ("soon", "", "2026-13-01T00:00:00Z", "2026-01-31T12:00:00", "0001-01-01T00:00:00+23:59")


@pytest.mark.parametrize("kind", KINDS)
def test_payloads_as_they_are_sent_can_be_read(kind: str) -> None:
    """The payloads below are mutations of one that is right."""
    decode, right = KINDS[kind]
    assert decode(json.dumps(right).encode()) is not None


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        *(
            (kind, path, wrong)
            for kind, path in (
                ("result", ("usage", "prompt_tokens")),
                ("result", ("attempt",)),
                ("result", ("work", "prompt_bytes")),
                ("state event", ("attempt",)),
                ("token frame", ("index",)),
                ("inferer", ("slots",)),
                ("inferer", ("threads",)),
                ("letter", ("attempts",)),
            )
            for wrong in NOT_NUMBERS
        ),
        *(
            (kind, (name,), wrong)
            for kind, name in (
                ("request", "queued_at"),
                ("result", "finished_at"),
                ("result", "queued_at"),
                ("result", "started_at"),
                ("state event", "at"),
                ("inferer", "started_at"),
                ("inferer", "idle_since"),
                ("letter", "at"),
            )
            for wrong in NOT_TIMES
        ),
        ("result", ("timings", "prompt_ms"), 1e300),
        ("result", ("work", "max_tokens"), 0),
        ("state event", ("work", "max_tokens"), 0),
        ("inferer", ("n_ctx",), 0),
        ("inferer", ("jobs",), [{**RUNNING, "work": {**WORK, "max_tokens": 0}}]),
        ("inferer", ("tasks",), ["chat"] * 17),
        ("inferer", ("cpus",), [0] * 4097),
        ("inferer", ("cpus",), [-1]),
        ("facts", ("n_ctx",), 0),
        ("facts", ("tasks",), ["chat"] * 17),
        ("inferer", ("id",), ""),
        ("inferer", ("id",), "x" * 5000),
    ],
)
def test_values_that_later_code_relies_on_are_checked(
    kind: str, path: tuple[str, ...], wrong: Any
) -> None:
    """Numbers in their range, times that can be computed with: refused when it is decoded."""
    decode, right = KINDS[kind]
    payload = json.loads(json.dumps(right))
    part = payload
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = wrong
    with pytest.raises(Unreadable):
        decode(json.dumps(payload).encode())
    assert decode.read(json.dumps(payload).encode(), "a.subject") is None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused(kind: str, data: st.DataObject) -> None:
    """Never another exception; what is read can be encoded again and read back."""
    decode, right = KINDS[kind]
    good = json.dumps(right).encode()
    cut = st.integers(0, len(good))
    start, end = sorted((data.draw(cut), data.draw(cut)))
    middle = data.draw(
        st.binary(max_size=20)
        | st.sampled_from([b'"\xff"', b"[" * 5000, b"1e999", b"1" * 5000, b'"\\ud800"', b"NaN"])
    )
    mutated = good[:start] + middle + good[end:]
    found = decode.read(mutated, "a.subject")
    if found is not None:
        assert decode(encode(found)) == found


@given(st.text(max_size=40))
@settings(max_examples=500)
def test_any_text_is_a_time_or_a_value_error(text: str) -> None:
    """A time that was read can be written, and read again."""
    try:
        at = parse_timestamp(text)
    except ValueError:
        return
    assert parse_timestamp(timestamp(at)) == at


def test_the_first_unreadable_message_of_each_kind_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Then the 10th, the 100th: a flood fills no disk, and its size is known."""
    what = new_job_id()
    for _ in range(150):
        codecs.skip(what, "a.subject", ValueError("why"))
    lines = [line for line in capsys.readouterr().out.splitlines() if what in line]
    assert [line.partition("count=")[2].split()[0] for line in lines] == ["1", "10", "100"]


def test_a_result_of_another_job_is_not_believed(broker: Broker) -> None:
    """It is not this one's, whatever it says."""
    result = decode_stored(
        subjects.result("tiny", new_job_id()), json.dumps(COMPLETED).encode(), broker.now()
    )
    assert getattr(result, "code", None) == "unreadable_result"


UNREADABLE = (
    b'{"id":"x","model":"\xff"}',
    b"[" * 5000,
    b'{"id":"x","model":' + b"[" * 5000 + b"}",
    b"",
    b"\xff\xfe",
    json.dumps({**ENTRY, "id": "another"}).encode(),
    json.dumps({**ENTRY, "slots": 10**400}).encode(),
)


async def test_entries_by_hand_do_not_hide_a_real_one(broker: Broker) -> None:
    """A thousand of them: the real inferer is found, and nothing else."""
    await ensure_topology(broker, Topology(), [])
    entry = InfererEntry(**{**ENTRY, "id": "real", "jobs": []})
    await broker.js.publish(subjects.inferer("tiny", "real"), encode(entry))
    for number in range(1000):
        headers = {"Status": "404", "Nats-Sequence": "x"} if number % 2 else None
        payload = UNREADABLE[number % len(UNREADABLE)]
        await broker.nc.publish(
            subjects.inferer("tiny", f"fake-{number}"), payload, headers=headers
        )
    await flush(broker.nc)
    live, _ = await read_inferers(broker)
    assert [one.entry for one in live] == [entry]


async def test_oversized_entries_do_not_keep_the_limit_from_following(queue: Broker) -> None:
    """Neither fits what a gateway makes of it: a consumer's metadata, the notices of overlaps."""
    for number in range(12):
        oversized = {"tasks": ["chat"] * 500_000} if number % 2 else {"cpus": [2**31 - 1] * 65_536}
        entry = {**ENTRY, "id": f"i-{number}", "threads": 65_536, "jobs": [], **oversized}
        await queue.js.publish(subjects.inferer("tiny", entry["id"]), json.dumps(entry).encode())
    real = InfererEntry(**{**ENTRY, "id": "real", "slots": 3, "jobs": []})
    await queue.js.publish(subjects.inferer("tiny", "real"), encode(real))
    fleet = Fleet(queue, Topology(), ["tiny"])
    await fleet.refresh()
    model = await read_model(queue, "tiny")
    assert model is not None
    assert (model.limit, fleet.inferers("tiny")) == (3, [real])


async def test_headers_that_are_not_ascii_are_read_from_the_leader(broker: Broker) -> None:
    """As from a replica, as text."""
    await ensure_topology(broker, Topology(), [])
    subject = subjects.state_events("tiny", JOB)
    await broker.js.publish(subject, b"x", headers={"Name": "größe", "Deadline": "morgen"})
    for get in (broker.direct_get, broker.leader_get):
        found = await get(subjects.EVENTS, last_by_subj=subject)
        assert found is not None
        assert (found.headers["Name"], found.headers["Deadline"]) == ("größe", "morgen")
        assert (found.subject, found.data) == (subject, b"x")
    assert await broker.leader_get(subjects.EVENTS, last_by_subj="infer.events.x.y") is None
    assert await find_result(broker, JOB, from_leader=True) is None
