"""Every way in which a job can end: HTTP, events, OpenAI's routes, NATS and the command line say
the same of it."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from shared.broker.connection import Broker
from shared.broker.results import store_result
from shared.config import BrokerSettings
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.codecs import encode
from shared.wire.events import TokenFrame
from shared.wire.results import Completed, Failed, Result, Usage, stopped
from tests.support.processes import (
    PATIENCE_S,
    Stack,
    clean_environment,
    scripts,
    server_sent_events,
)
from tests.support.schemas import TOO_MUCH

OK, FAILED, USAGE = 0, 1, 2


class Reason(NamedTuple):
    """``outcome`` is the wire's word, ``state`` Celery's, ``openai`` the status on /v1."""

    outcome: str
    state: str
    openai: int


REASONS = {
    "completed": Reason("completed", "SUCCESS", 200),
    "model_error": Reason("failed", "FAILURE", 500),
    "worker_lost": Reason("failed", "FAILURE", 500),
    "out_of_memory": Reason("failed", "FAILURE", 500),
    "prompt_too_long": Reason("failed", "FAILURE", 400),
    "result_too_large": Reason("failed", "FAILURE", 400),
    "invalid_request": Reason("failed", "FAILURE", 400),
    "cancelled": Reason("cancelled", "REVOKED", 409),
    "client_disconnected": Reason("cancelled", "REVOKED", 409),
    "deadline_passed": Reason("expired", "FAILURE", 504),
    "timed_out": Reason("expired", "FAILURE", 504),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A stack whose broker takes messages of 64 kB at most."""
    folder = tmp_path_factory.mktemp("stack")
    configuration = folder / "nats.conf"
    configuration.write_text("max_payload: 24KB\njetstream: enabled\n")
    with Stack(folder, configuration) as running:
        running.serve(tiny_model)
        yield running


@pytest.fixture
async def broker(site: Stack) -> AsyncIterator[Broker]:
    connection = Broker(BrokerSettings(url=site.nats.url), "test")
    await connection.connect()
    yield connection
    await connection.close()


def complete(site: Stack) -> str:
    return site.submit(prompt="hi", max_tokens=3)


def send_too_long_a_prompt(site: Stack) -> str:
    return site.submit(prompt="a " * 7_000)


def ask_for_too_much_work(site: Stack) -> str:
    """The gateway finds nothing wrong with it."""
    wanted = {"type": "json_schema", "json_schema": {"schema": TOO_MUCH}}
    return site.submit(prompt="hi", max_tokens=20, response_format=wanted)


def send_as_much_as_fits(site: Stack) -> str:
    """The request goes into one message; a result has more to say, and does not."""
    return site.submit(prompt="hi", max_tokens=1, metadata={"pad": "x" * (16 * 1024 - 250)})


def cancel(site: Stack) -> str:
    job_id = site.submit(prompt="go on")
    site.wait_for_state(job_id, "STARTED")
    assert site.http.delete(f"/jobs/{job_id}").status_code == 200
    return job_id


def hang_up(site: Stack) -> str:
    known = _accepted(site)
    with httpx2.Client(base_url=site.url) as impatient, pytest.raises(httpx2.ReadTimeout):
        impatient.post(
            "/jobs", json={"prompt": "go on"}, headers={"prefer": "wait=60"}, timeout=0.3
        )
    (job_id,) = _accepted(site) - known
    return job_id


def wait_too_long(site: Stack) -> str:
    blocker = site.submit(prompt="go on")
    site.wait_for_state(blocker, "STARTED")
    job_id = site.submit(prompt="hi", timeout_s=0.1)
    site.wait_for_end(job_id)
    site.http.delete(f"/jobs/{blocker}")
    return job_id


def run_too_long(site: Stack) -> str:
    return site.submit(prompt="go on", timeout_s=0.3)


BROUGHT_ABOUT: dict[str, Callable[[Stack], str]] = {
    "completed": complete,
    "prompt_too_long": send_too_long_a_prompt,
    "invalid_request": ask_for_too_much_work,
    "result_too_large": send_as_much_as_fits,
    "cancelled": cancel,
    "client_disconnected": hang_up,
    "deadline_passed": wait_too_long,
    "timed_out": run_too_long,
}
"""The others need an inferer that breaks: their results are stored as it would store them."""


@pytest.mark.parametrize("code", REASONS)
async def test_every_reader_gets_the_same_reason(site: Stack, broker: Broker, code: str) -> None:
    """The state, the code and the sentence; and what a cancel then makes of it."""
    reason = REASONS[code]
    if code in BROUGHT_ABOUT:
        job_id = BROUGHT_ABOUT[code](site)
    else:
        job_id = new_job_id()
        await store_result(broker, _result(job_id, code), 5)
    status = site.wait_for_end(job_id)
    result = await _request(broker, "infer.result", job_id)

    assert status["state"] == reason.state
    assert result["outcome"] == reason.outcome
    assert (status["started_at"] is None) == (code == "deadline_passed")
    if code == "completed":
        assert status["error"] is None
        assert status["result"]["text"] == result["text"]
    else:
        assert status["result"] is None
        named = {"param": result["param"]} if "param" in result else {}
        assert status["error"] == {"code": code, "message": result["message"], **named}
        assert result["code"] == code
        assert len(result["message"]) > 5
    with site.http.stream("GET", f"/jobs/{job_id}/events") as response:
        *_, last = server_sent_events(response)
    assert (last["event"], json.loads(last["data"])) == ("result", status)
    assert await _request(broker, "infer.status", job_id) == status

    shown = _sluice(site, "status", job_id)
    assert (shown.returncode, shown.stderr) == (OK if code == "completed" else FAILED, "")
    assert reason.state in shown.stdout
    if code != "completed":
        message = str(result["message"])
        assert (message if message.startswith(code) else f"{code}: {message}") in shown.stdout

    late = site.http.delete(f"/jobs/{job_id}")
    if reason.outcome == "cancelled":
        assert (late.status_code, late.json()) == (200, status)
        assert await _request(broker, "infer.cancel", job_id) == status
    else:
        printed = late.json()
        assert (late.status_code, printed["code"]) == (409, "already_finished")
        assert printed["state"] == reason.state
        refusal = f"already_finished: {printed['detail']}"
        assert await _refusal(broker, "infer.cancel", job_id) == ("409", refusal)


@pytest.mark.parametrize("code", REASONS)
async def test_every_waiting_client_gets_the_same_reason(
    site: Stack, broker: Broker, code: str
) -> None:
    """A submit that waits, OpenAI's answers, whole, as a stream and in the middle of one, and the
    inferer's reply over NATS."""
    reason = REASONS[code]
    async with httpx2.AsyncClient(base_url=site.url, timeout=PATIENCE_S) as http:

        def post(path: str, **options: Any) -> Any:
            body = {"prompt": "hi", "max_tokens": 3, **options}
            return http.post(path, json=body, headers={"prefer": "wait=60"})

        asked = {
            "job": post("/jobs"),
            "whole": post("/v1/completions"),
            "stream": post("/v1/completions", stream=True),
            "opened": post("/v1/completions", stream=True),
            "nats": _request(broker, "infer.complete", '{"prompt":"hi","max_tokens":3}'),
        }
        asking, ids = {}, {}
        _set_concurrency(site, 0)
        for name, call in asked.items():
            known = _accepted(site)
            asking[name] = asyncio.create_task(call)
            ids[name] = await _new_job(site, known)
        frame = TokenFrame(attempt=1, index=0, tokens=["all"])
        await broker.js.publish(subjects.token_events("tiny", ids["opened"]), encode(frame))
        for job_id in ids.values():
            await store_result(broker, _result(job_id, code), 5)
        _set_concurrency(site, 1)
        answers = {name: await one for name, one in asking.items()}

    job = answers["job"]
    assert (job.status_code, job.json()) == (200, site.status(ids["job"]))
    assert (job.json()["state"], answers["nats"]["outcome"]) == (reason.state, reason.outcome)
    assert answers["whole"].status_code == answers["stream"].status_code == reason.openai
    opened = _chunks(answers["opened"])
    assert opened[1]["choices"][0]["text"] == "all"
    if code == "completed":
        assert answers["whole"].json()["choices"][0]["text"] == answers["nats"]["text"]
        for chunks in (opened, _chunks(answers["stream"])):
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            assert text == job.json()["result"]["text"] == answers["nats"]["text"]
    else:
        error = answers["whole"].json()["error"]
        assert answers["stream"].json()["error"] == opened[-1]["error"] == error
        printed = {"code": error["code"], "message": error["message"]}
        named = {"param": error["param"]} if error["param"] else {}
        assert {**printed, **named} == job.json()["error"]
        assert printed == {name: answers["nats"][name] for name in ("code", "message")}
        assert error["code"] == code
        # Or the official client would run the job a second time.
        assert answers["whole"].headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("job_id", "status", "code"),
    [
        pytest.param(new_job_id(), 404, "job_not_found", id="never seen"),
        pytest.param("01890000-0000-7000-8000-000000000000", 410, "job_aged_out", id="aged out"),
    ],
)
async def test_an_unknown_job_is_reported_as_such_everywhere(
    site: Stack, broker: Broker, job_id: str, status: int, code: str
) -> None:
    """404 if it never was, 410 if its id is older than results are kept, whoever asks what."""
    for method, path in (("GET", "/status/{}"), ("GET", "/jobs/{}/events"), ("DELETE", "/jobs/{}")):
        answer = site.http.request(method, path.format(job_id))
        assert (answer.status_code, answer.json()["code"]) == (status, code)
    detail = answer.json()["detail"]
    for endpoint in ("status", "result", "cancel"):
        refusal = await _refusal(broker, f"infer.{endpoint}", job_id)
        assert refusal == (str(status), f"{code}: {detail}")
    for command in ("status", "cancel"):
        ended = _sluice(site, command, job_id)
        printed = (ended.returncode, ended.stdout, ended.stderr)
        assert printed == (USAGE, "", f"sluice: {detail}\n")


def _result(job_id: str, code: str) -> Result:
    """A result as an inferer or a gateway would store it."""
    common: dict[str, Any] = {
        "id": job_id,
        "model": "tiny",
        "attempt": 3,
        "queued_at": timestamp(),
        "started_at": None if code == "deadline_passed" else timestamp(),
        "finished_at": timestamp(),
        "inferer": "inferer-0",
    }
    if code == "completed":
        usage = Usage(1, 3, 4)
        return Completed(**common, text="all is well", finish_reason="stop", usage=usage)
    if REASONS[code].outcome == "failed":
        return Failed(**common, code=code, message=f"why it is {code}")
    return stopped(code, **common)  # type: ignore[arg-type]  # the others are


def _accepted(site: Stack) -> set[str]:
    return {event["job_id"] for event in site.gateways[0].events("request_accepted")}


async def _new_job(site: Stack, known: set[str]) -> str:
    """The id of the job that is accepted next."""
    async with asyncio.timeout(PATIENCE_S):
        while not (new := _accepted(site) - known):
            await asyncio.sleep(0.005)
    (job_id,) = new
    return job_id


def _set_concurrency(site: Stack, slots: int) -> None:
    assert site.http.put("/concurrency", json={"concurrency": slots}).status_code == 200


def _sluice(site: Stack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [scripts() / "sluice", *arguments],
        env={**clean_environment(), "SLUICE_URL": site.url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def _chunks(answer: httpx2.Response) -> list[dict[str, Any]]:
    """What an OpenAI stream consisted of."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    data = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return [json.loads(line) for line in data if line.startswith("{")]


async def _request(broker: Broker, subject: str, body: str) -> Any:
    """The answer to one request, which must not be an error."""
    answer = await broker.nc.request(subject, body.encode(), timeout=PATIENCE_S)
    assert not answer.headers, answer.headers
    return json.loads(answer.data)


async def _refusal(broker: Broker, subject: str, body: str) -> tuple[str, str]:
    """The code and the description of the error that answers one request."""
    answer = await broker.nc.request(subject, body.encode(), timeout=PATIENCE_S)
    headers = answer.headers or {}
    return headers["Nats-Service-Error-Code"], headers["Nats-Service-Error"]
