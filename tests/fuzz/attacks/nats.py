"""NATS that no client would send."""

import json
import threading
from contextlib import suppress
from hashlib import sha256
from typing import Any

from hypothesis import strategies as st

from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.fuzz.attacks.attack import attack
from tests.fuzz.inputs import messages
from tests.fuzz.inputs.values import mangled
from tests.fuzz.target import MODEL, Fault, Target
from tests.support.raw_nats import Closed, publication

NOT_AN_INBOX = b"fuzz.reply"
OWN_JOB = {"prompt": "a", "max_tokens": 30, "timeout_s": 30}


@attack(st.lists(messages.strays(), min_size=1, max_size=8), count=15)
def strays(target: Target, sent: list[bytes]) -> None:
    """Invalid messages on every subject that is read: every process survives and still receives."""
    with suppress(Closed), target.nats() as connection:
        connection.send(b"".join(sent))
        connection.settle()
    target.require_hearing()


@attack(messages.protocol(), count=15)
def protocol(target: Target, pieces: list[bytes]) -> None:
    """Rubbish on a connection: the broker may close that one."""
    with suppress(Closed, TimeoutError), target.nats() as connection:
        for piece in pieces:
            connection.send(piece)
    target.require_hearing()


@attack(st.lists(messages.requests(), min_size=1, max_size=5), count=15)
def service(target: Target, sent: list[tuple[bytes, bytes, bytes | None, bytes]]) -> None:
    """Requests to the micro service: answers go to inboxes, and to nothing else."""
    with target.nats() as connection:
        connection.subscribe(NOT_AN_INBOX)
        for subject, reply, headers, data in sent:
            connection.publish(subject, data, reply, headers)
        with suppress(Closed):  # a header block that no server takes
            connection.settle()
        target.require_hearing()
        with suppress(Closed):
            connection.settle()
        for received in connection.received:
            if b" 503" not in received.headers[:20]:  # nobody is there: the broker says so itself
                raise Fault("an answer to something that is not an inbox", repr(received)[:500])


def _is_survived(headers: bytes | None) -> bool:
    """nats-server 2.15.1 itself dies of headers of one byte, where it republishes a stream."""
    return headers is None or len(headers) != 1


@attack(
    st.tuples(messages.header_blocks().filter(_is_survived), mangled(st.just(OWN_JOB))), count=15
)
def requests(target: Target, case: tuple[bytes | None, bytes]) -> None:
    """Rubbish on the queue itself: an inferer says what is wrong with it."""
    headers, data = case
    job_id = new_job_id()
    with suppress(Closed), target.nats() as connection:
        connection.publish(subjects.request(MODEL, job_id).encode(), data, b"", headers)
        connection.settle()
        target.accepted(job_id, f"requests {case!r}")
    if target.call("GET", f"/status/{job_id}").status_code == 200:
        target.end_of(job_id)


@attack(
    st.tuples(
        st.lists(
            st.one_of(
                mangled(st.just(messages.STATE)).map(lambda data: ("state", data)),
                mangled(st.just(messages.FRAME)).map(lambda data: ("tokens", data)),
                mangled(st.just({"code": "cancelled"})).map(lambda data: ("cancel", data)),
                mangled(st.just(messages.result("x"))).map(lambda data: ("finished", data)),
            ),
            max_size=5,
        ),
        messages.header_blocks(),
    ),
    count=10,
)
def about_a_job(target: Target, case: tuple[list[tuple[str, bytes]], bytes | None]) -> None:
    """Rubbish about a job that runs: its own result is what its client gets."""
    printed, headers = case
    job_id = target.submit(OWN_JOB, "about_a_job")
    assert job_id is not None
    where = {
        "state": subjects.state_events("tiny", job_id),
        "tokens": subjects.token_events("tiny", job_id),
        "cancel": subjects.cancel("tiny", job_id),
        "finished": subjects.finished("tiny", job_id),
    }
    with suppress(Closed), target.nats() as connection:
        for kind, data in printed:
            connection.publish(where[kind].encode(), data, b"", headers)
        connection.settle()
    status = target.end_of(job_id)
    if (status.get("result") or {}).get("text") == "forged":
        raise Fault("a forged result was believed", json.dumps(status))
    target.events_of(job_id)


@attack(mangled(st.just(messages.result("x"))), count=5)
def forged_end(target: Target, data: bytes) -> None:
    """Somebody announces an end that is not stored: who waits gets the stored one."""
    key = {"idempotency-key": new_job_id()}
    body = {**OWN_JOB, "max_tokens": 300}
    job_id = target.submit(body, "forged_end", **key)
    assert job_id is not None
    waiting: list[dict[str, Any]] = []

    def wait() -> None:
        answer = target.call("POST", "/jobs", json=body, headers={**key, "prefer": "wait=30"})
        waiting.append(answer.json())

    waiter = threading.Thread(target=wait)
    waiter.start()
    forged = data.replace(b'"x"', f'"{job_id}"'.encode(), 1)
    with suppress(Closed), target.nats() as connection:
        while waiter.is_alive():
            connection.send(publication(subjects.finished("tiny", job_id).encode(), forged))
            connection.settle()
            waiter.join(0.02)
    target.end_of(job_id)
    if waiting and (waiting[0].get("result") or {}).get("text") == "forged":
        raise Fault("a forged result was believed", json.dumps(waiting[0]))


@attack(mangled(st.just({"id": new_job_id(), "digest": "0" * 64})), count=10)
def idempotency_records(target: Target, data: bytes) -> None:
    """A record of a key that cannot be read: a submit with that key is refused or accepted."""
    key = new_job_id()
    record = subjects.idempotency(sha256(f"{subjects.PUBLIC}\0{key}".encode()).hexdigest())
    with suppress(Closed), target.nats() as connection:
        connection.publish(record.encode(), data)
        connection.settle()
    job_id = target.submit(OWN_JOB, "idempotency_records", **{"idempotency-key": key})
    if job_id is not None and target.call("GET", f"/status/{job_id}").status_code == 200:
        target.end_of(job_id)
