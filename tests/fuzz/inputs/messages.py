"""Messages on the subjects that Sluice reads, and bytes that are not valid protocol."""

from typing import Any

from hypothesis import strategies as st

from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.fuzz.inputs.bodies import submissions
from tests.fuzz.inputs.values import mangled
from tests.support.raw_nats import publication

ENDPOINTS = (
    *("chat", "complete", "submit", "status", "result", "cancel"),
    *("queue", "inferers", "concurrency", "nobody"),
)
SERVICE = ("$SRV.PING", "$SRV.PING.sluice", "$SRV.INFO", "$SRV.STATS.sluice", "$SRV.INFO.sluice.x")

REPLIES = (
    *(b"", b"_INBOX.a.b", b"_INBOX.\xff\xfe", b"_INBOX." + b"x" * 1_500, b"fuzz.reply"),
    *(b"$JS.API.STREAM.DELETE.EVENTS", b"$JS.API.STREAM.PURGE.REQUESTS", b"infer.queue"),
    *(b"$JS.API.STREAM.MSG.DELETE.RESULTS", b"infer.cancel.tiny.x", b"_INBOX", b"_INBOX."),
)
"""None of which may get an answer but the inboxes."""

HEADER_BLOCKS = (
    *(
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0\r\nA:b\r\n\r\n",
        b"X",
        b"",
        b"NATS/1.0",
        b"NATS/1.0 503\r\n\r\n",
    ),
    *(b"NATS/1.0 \xff\xfe\r\n\r\n", b"NATS/1.0 abc def\r\n\r\n", b"NATS/1.0\r\n\xff: \xfe\r\n\r\n"),
    *(b"NATS/1.0\r\nA\r\n\r\n", b"NATS/1.0\r\n: \r\n\r\n", b"NATS/1.0\r\nA: b\r\nA: c\r\n\r\n"),
    *(b"NATS/1.0\r\nIdempotency-Key: \r\n\r\n", b"NATS/1.0\r\nDeadline: soon\r\n\r\n", b"\r\n\r\n"),
    b"NATS/1.0\r\nReply-To: $JS.API.STREAM.PURGE.EVENTS\r\nSluice-Version: 9\r\n\r\n",
    b"NATS/1.0\r\nDeadline: 9999-99-99T99:99:99Z\r\ntraceparent: \xff\r\n\r\n",
    b"NATS/1.0\r\n" + b"A: b\r\n" * 2_000 + b"\r\n",
)


def header_blocks() -> st.SearchStrategy[bytes | None]:
    free = st.binary(max_size=60).filter(lambda block: b"nats-" not in block.lower())
    return st.one_of(st.none(), st.none(), st.sampled_from(HEADER_BLOCKS), free)


STATE = {"state": "started", "attempt": 1, "at": "2026-01-31T12:00:00.000000Z", "inferer": "fuzz"}
FRAME = {"attempt": 1, "index": 0, "tokens": ["a"]}
ENTRY = {
    "id": "x",
    "model": "tiny",
    "slots": 1,
    "host": "h",
    "threads": 1,
    "n_ctx": 8192,
    "tasks": ["chat", "complete"],
    "started_at": STATE["at"],
    "version": "0",
    "jobs": [],
    "cpus": [0],
}
LETTER = {
    "id": "x",
    "model": "tiny",
    "code": "model_error",
    "message": "m",
    "attempts": 3,
    "at": STATE["at"],
    "request": "{}",
}


def result(job_id: str) -> dict[str, Any]:
    """A result that an inferer might store."""
    return {
        "outcome": "completed",
        "id": job_id,
        "model": "tiny",
        "attempt": 1,
        "text": "forged",
        "queued_at": STATE["at"],
        "finished_at": STATE["at"],
        "finish_reason": "stop",
        "started_at": STATE["at"],
        "inferer": "fuzz",
        "task": "complete",
        "usage": {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20},
        "timings": {"queued_ms": 0.0, "prompt_ms": 10.0, "generation_ms": 10.0},
        "work": {"prompt_bytes": 10, "max_tokens": 10, "task": "complete"},
    }


RESULT = 2
"""The kind of message that nats-server dies of with one byte as headers (decision 20)."""


@st.composite
def strays(draw: st.DrawFn) -> bytes:
    """A message that somebody puts on a subject that Sluice reads, about a job that nobody has."""
    job_id = draw(st.one_of(st.builds(new_job_id), st.sampled_from(("x", "\xff", "0", "*"))))
    kind = draw(st.integers(0, 9))
    data: bytes
    match kind:
        case 0:
            subject, data = subjects.inferer("tiny", "fuzz"), draw(mangled(st.just(ENTRY)))
        case 1:
            subject = subjects.idempotency("fuzz" + "0" * 60)
            data = draw(mangled(st.just({"id": job_id, "digest": "x"})))
        case _ if kind == RESULT:
            subject, data = subjects.result("tiny", job_id), draw(mangled(st.just(result(job_id))))
        case 3:
            subject, data = (
                subjects.finished("tiny", job_id),
                draw(mangled(st.just(result(job_id)))),
            )
        case 4:
            subject, data = subjects.state_events("tiny", job_id), draw(mangled(st.just(STATE)))
        case 5:
            subject, data = subjects.token_events("tiny", job_id), draw(mangled(st.just(FRAME)))
        case 6:
            subject, data = subjects.dead("tiny", job_id), draw(mangled(st.just(LETTER)))
        case 7:
            subject, data = (
                subjects.cancel("tiny", job_id),
                draw(mangled(st.just({"code": "cancelled"}))),
            )
        case 8:
            subject = subjects.control(
                "tiny", draw(st.sampled_from(("inferer-0", "inferer-1", "x")))
            )
            concurrency = st.integers(1, 3).map(lambda slots: {"concurrency": slots})
            data = draw(mangled(concurrency))
        case _:
            subject = draw(st.sampled_from(("infer.events.x", "infer.retry.tiny.x", "infer.x.y.z")))
            data = draw(st.binary(max_size=50))
    # The broker answers these two itself when it has stored them, wherever that goes.
    reply = draw(st.sampled_from(REPLIES)) if kind in (7, 8) else b""
    blocks = header_blocks()
    if kind == RESULT:
        blocks = blocks.filter(lambda block: block is None or len(block) != 1)
    return publication(subject.encode("latin-1"), data, reply, draw(blocks))


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes, bytes | None, bytes]:
    """``(subject, reply, headers, data)`` of a request to the micro service."""
    name = draw(st.sampled_from((*(f"infer.{name}" for name in ENDPOINTS), *SERVICE)))
    data = draw(
        st.one_of(
            mangled(submissions()),
            mangled(st.just({"id": new_job_id()})),
            mangled(st.just({"concurrency": 2})),
            st.just(b""),
            st.binary(max_size=60),
        )
    )
    return name.encode(), draw(st.sampled_from(REPLIES)), draw(header_blocks()), data


BROKEN = (
    *(b"HPUB infer.queue _INBOX.a.b 1 1\r\nX\r\n", b"HPUB infer.queue 5 2\r\nXX\r\n"),
    *(
        b"HPUB infer.cancel.tiny.x _INBOX.a 0 0\r\n\r\n",
        b"HPUB infer.control.tiny.inferer-0 1 1\r\nX\r\n",
    ),
    *(
        b"PUB infer.queue -1\r\n\r\n",
        b"PUB infer.queue 99999999999\r\n",
        b"PUB  1\r\nx\r\n",
    ),
    *(
        b"PUB infer.chat _INBOX.\xff 2\r\n{}\r\n",
        b"SUB > 1\r\n",
        b"UNSUB 1\r\n",
        b"MSG a 1 1\r\nx\r\n",
    ),
    *(b"CONNECT " + b"[" * 3_000 + b"\r\n", b"INFO {}\r\n", b"-ERR 'x'\r\n", b"A" * 5_000),
)


@st.composite
def protocol(draw: st.DrawFn) -> list[bytes]:
    """Bytes on a client's own connection, cut anywhere: the broker may close it, and no other."""
    good = st.one_of(strays(), st.sampled_from((b"PING\r\n", b"SUB a 1\r\n", b"CONNECT {}\r\n")))
    broken = st.sampled_from(BROKEN)
    kinds = st.one_of(good, broken, st.binary(max_size=60).filter(lambda sent: b"$JS" not in sent))
    sent = b"".join(draw(st.lists(kinds, min_size=1, max_size=6)))
    cuts = sorted(draw(st.lists(st.integers(0, len(sent)), max_size=3)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    return [piece for piece in pieces if piece]
