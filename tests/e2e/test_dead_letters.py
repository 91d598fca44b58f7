"""Dead letters over HTTP and on the command line; no inferer runs, so what is sent again waits."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec import Raw

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import parse_timestamp, timestamp
from shared.wire import subjects
from shared.wire.codecs import decode_request, encode
from shared.wire.requests import InferenceRequest
from shared.wire.results import DeadLetter
from tests.support.processes import PATIENCE_S, Stack, clean_environment, scripts

REQUEST = InferenceRequest(
    task="complete",
    prompt="hi",
    max_tokens=7,
    seed=5,
    stream=True,
    queued_at="2026-01-31T12:00:00.000000Z",
    via="nats",
    metadata=Raw(b'{"k":1}'),
)

Sluice = Callable[..., subprocess.CompletedProcess[str]]
OK, FAILED, USAGE = 0, 1, 2


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """NATS and a gateway that knows the model `tiny`."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.start_gateway(GATEWAY_MODELS="tiny").wait_for("gateway_ready")
        yield running


@pytest.fixture
async def broker(gateway: Stack) -> AsyncIterator[Broker]:
    """Without letters and requests."""
    connection = Broker(BrokerSettings(url=gateway.nats.url), "test")
    await connection.connect()
    for stream in (subjects.DEAD, subjects.REQUESTS):
        await connection.js.purge_stream(stream)
    yield connection
    await connection.close()


@pytest.fixture
def sluice(gateway: Stack) -> Sluice:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [scripts() / "sluice", *arguments],
            env={**clean_environment(), "SLUICE_URL": gateway.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    return run


async def bury(
    broker: Broker, request: bytes | None = None, model: str = "tiny", job_id: str | None = None
) -> str:
    """Store a letter, as an inferer does; the id of its job."""
    letter = DeadLetter(
        id=job_id or new_job_id(),
        model=model,
        code="out_of_memory",
        message="no room",
        attempts=3,
        at=timestamp(),
        request=(encode(REQUEST) if request is None else request).decode("utf-8", "replace"),
        priority="high",
        timeout_s=600,
    )
    await broker.publish_stored(subjects.dead(model, letter.id), encode(letter), {}, 5)
    return letter.id


async def letters_left(broker: Broker) -> int:
    return int((await broker.js.stream_info(subjects.DEAD)).state.messages)


async def test_letters_are_listed_in_pages_the_newest_first(gateway: Stack, broker: Broker) -> None:
    """Page by page, each letter once, also over the gaps that dropped ones have left."""
    ids = [await bury(broker) for _ in range(12)]
    for job_id in ids[3:9]:
        assert gateway.http.delete(f"/dead/{job_id}").json()["id"] == job_id
    left = ids[:3] + ids[9:]
    pages: list[list[str]] = []
    query: dict[str, Any] = {"limit": 4}
    while True:
        page = gateway.http.get("/dead", params=query).json()
        pages.append([letter["id"] for letter in page["letters"]])
        if page["before"] is None:
            break
        query["before"] = page["before"]
    assert pages == [left[:1:-1], left[1::-1]]
    assert [letter["id"] for letter in gateway.http.get("/dead").json()["letters"]] == left[::-1]


async def test_a_list_without_letters_is_empty(gateway: Stack, broker: Broker) -> None:
    """An empty page, and limits that make no sense are refused."""
    assert gateway.http.get("/dead").json() == {"letters": [], "before": None}
    for query in ("limit=0", "limit=201", "limit=x", "before=0"):
        assert gateway.http.get(f"/dead?{query}").status_code == 400


async def test_a_page_of_large_letters_is_bounded_in_bytes(gateway: Stack, broker: Broker) -> None:
    """It is shorter than asked for, the pages together have them all, and the gateway's memory
    holds a few of them at a time: two hundred would be a gigabyte and a half."""
    status = Path(f"/proc/{gateway.gateways[0].pid}/status")

    def peak_mb() -> int:
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) // 1024

    buried = [await bury(broker, b"x" * 7_000_000) for _ in range(40)]
    before_mb = peak_mb()
    seen: list[str] = []
    query: dict[str, int | None] = {"limit": 200}
    while query.get("before", 1) is not None:
        page = gateway.http.get("/dead", params=query).json()
        seen += [letter["id"] for letter in page["letters"]]
        query["before"] = page["before"]
    assert seen == buried[::-1]
    assert peak_mb() - before_mb < 150


async def test_a_letter_is_shown_in_full(gateway: Stack, broker: Broker) -> None:
    """The list leaves the request out, the letter itself has it."""
    job_id = await bury(broker)
    (head,) = gateway.http.get("/dead").json()["letters"]
    letter = gateway.http.get(f"/dead/{job_id}").json()
    printed = (head["id"], head["model"], head["code"], head["attempts"], head["priority"])
    assert printed == (job_id, "tiny", "out_of_memory", 3, "high")
    assert "request" not in head
    assert decode_request(letter["request"].encode()) == REQUEST


async def test_retry_sends_the_same_request_as_a_new_job(gateway: Stack, broker: Broker) -> None:
    """With `retry_of`, its priority and its time; not with the inbox, which nobody reads now. The
    letter is gone."""
    job_id = await bury(broker)
    answer = gateway.http.post(f"/dead/{job_id}/retry")
    accepted = answer.json()
    assert (answer.status_code, accepted["state"]) == (202, "PENDING")
    assert answer.headers["location"] == f"/status/{accepted['id']}"
    assert accepted["retry_of"] == job_id != accepted["id"]
    assert gateway.status(accepted["id"])["retry_of"] == job_id
    stored = await broker.direct_get(
        subjects.REQUESTS, last_by_subj=subjects.request("tiny", accepted["id"], "high")
    )
    assert stored is not None
    request = decode_request(stored.data)
    same = ("prompt", "max_tokens", "seed", "metadata")
    for name in same:
        assert getattr(request, name) == getattr(REQUEST, name)
    assert (request.retry_of, request.stream) == (job_id, False)
    assert request.queued_at is not None
    assert request.queued_at > str(REQUEST.queued_at)
    left = parse_timestamp(stored.headers["Deadline"]) - parse_timestamp(request.queued_at)
    assert left.total_seconds() == 600
    assert await letters_left(broker) == 0
    assert gateway.http.post(f"/dead/{job_id}/retry").status_code == 404
    cancelled = gateway.http.delete(f"/jobs/{accepted['id']}").json()
    assert (cancelled["state"], cancelled["retry_of"]) == ("REVOKED", job_id)


async def test_a_letter_that_is_sent_again_twice_is_one_job(gateway: Stack, broker: Broker) -> None:
    """At the same moment; or once more by whoever finds it still there, as the gateway died before
    it could drop it."""
    job_id = await bury(broker)
    async with httpx2.AsyncClient(base_url=gateway.url, timeout=PATIENCE_S) as http:
        answers = await asyncio.gather(*(http.post(f"/dead/{job_id}/retry") for _ in range(8)))
    accepted = [answer.json() for answer in answers if answer.status_code == 202]
    assert len({job["id"] for job in accepted}) == 1
    assert await letters_left(broker) == 0
    assert {answer.status_code for answer in answers} <= {202, 404}  # it was dropped meanwhile

    await bury(broker, job_id=job_id)
    assert gateway.http.post(f"/dead/{job_id}/retry").json() == accepted[0]
    assert await letters_left(broker) == 0
    assert (await broker.js.stream_info(subjects.REQUESTS)).state.messages == 1


@pytest.mark.parametrize("request_", [b"\xff", b"{}", b'{"prompt":"x' + b"y" * 100])
async def test_a_letter_without_a_valid_request_cannot_be_sent_again(
    gateway: Stack, broker: Broker, request_: bytes
) -> None:
    """409 with a sentence, and the letter stays; it can be dropped."""
    job_id = await bury(broker, request_)
    answer = gateway.http.post(f"/dead/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "cannot_retry")
    assert "the complete request" in answer.json()["detail"]
    assert await letters_left(broker) == 1
    assert gateway.http.delete(f"/dead/{job_id}").status_code == 200
    assert await letters_left(broker) == 0


async def test_a_letter_of_a_model_that_is_gone_cannot_be_sent_again(
    gateway: Stack, broker: Broker
) -> None:
    """404 for the model, and the letter stays."""
    job_id = await bury(broker, model="other")
    answer = gateway.http.post(f"/dead/{job_id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert await letters_left(broker) == 1


@pytest.mark.parametrize("job_id", ["01890000-0000-7000-8000-000000000000", "*", "a.b", "%3E"])
async def test_an_unknown_id_is_not_found(gateway: Stack, broker: Broker, job_id: str) -> None:
    """404, also for what would be a wildcard: no other letter is touched."""
    await bury(broker)
    answers = [
        gateway.http.get(f"/dead/{job_id}"),
        gateway.http.post(f"/dead/{job_id}/retry"),
        gateway.http.delete(f"/dead/{job_id}"),
    ]
    printed = [(answer.status_code, answer.json()["code"]) for answer in answers]
    assert printed == [(404, "letter_not_found")] * 3
    assert await letters_left(broker) == 1


async def test_an_unreadable_letter_is_listed_and_can_be_dropped(
    gateway: Stack, broker: Broker
) -> None:
    """Put there by hand: it is listed as what it is, and can be dropped."""
    await broker.js.publish("infer.dead.tiny.mine", b"\xff{")
    (head,) = gateway.http.get("/dead").json()["letters"]
    assert (head["id"], head["code"]) == ("mine", "unreadable_letter")
    assert gateway.http.post("/dead/mine/retry").status_code == 409
    assert gateway.http.delete("/dead/mine").status_code == 200
    assert await letters_left(broker) == 0


async def test_the_command_line_lists_shows_and_retries_letters(
    sluice: Sluice, broker: Broker
) -> None:
    """list, show, retry and drop, for people."""
    first, second = await bury(broker), await bury(broker)
    listed = sluice("dead", "list").stdout
    assert listed.index(second) < listed.index(first)
    assert "out_of_memory: no room" in listed
    assert "next page: sluice dead list --before" in sluice("dead", "list", "--limit", "1").stdout
    shown = sluice("dead", "show", first)
    assert (shown.returncode, shown.stderr) == (OK, "")
    assert encode(REQUEST).decode() in shown.stdout
    retried = sluice("dead", "retry", first)
    assert (retried.returncode, retried.stderr) == (OK, "")
    status = sluice("status", retried.stdout.strip())
    assert status.returncode == OK
    assert f"retry of {first}" in " ".join(status.stdout.split())
    assert sluice("dead", "drop", second).stdout == f"dropped {second}\n"
    assert sluice("dead", "list").stdout == "no dead letters\n"


async def test_the_command_line_prints_letters_as_json(sluice: Sluice, broker: Broker) -> None:
    """The same for programs: what HTTP says."""
    first, second = await bury(broker), await bury(broker)

    def printed(*arguments: str) -> Any:
        return json.loads(sluice("dead", *arguments, "--json").stdout)

    assert [letter["id"] for letter in printed("list")["letters"]] == [second, first]
    page = printed("list", "--limit", "1")
    older = printed("list", "--before", str(page["before"]))
    assert [letter["id"] for letter in older["letters"]] == [first]
    assert printed("show", first)["attempts"] == 3
    assert printed("retry", first)["retry_of"] == first
    assert printed("drop", second)["id"] == second


async def test_the_command_line_refuses_what_it_cannot_do(sluice: Sluice, broker: Broker) -> None:
    """An unknown id is wrong use, as everywhere; a letter that cannot be sent again a failure."""
    for command in ("show", "retry", "drop"):
        missing = sluice("dead", command, "a b")
        assert (missing.returncode, missing.stdout) == (USAGE, "")
        assert "no dead letter" in missing.stderr
    spoilt = sluice("dead", "retry", await bury(broker, b"{}"))
    assert spoilt.returncode == FAILED
    assert "the complete request" in spoilt.stderr
