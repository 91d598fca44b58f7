"""Hosts with wrong clocks: all processes use the broker's."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from shared.timestamps import parse_timestamp
from tests.support.clocks import shifted_clock
from tests.support.processes import PATIENCE_S, Stack, eventually

HOUR_S = 3600
LONG = {"prompt": "tell me", "max_tokens": 4000, "seed": 1}
SHORT = {"prompt": "tell me", "max_tokens": 5, "seed": 1}


def is_about_now(at: str) -> bool:
    """This host's clock is the broker's here."""
    return abs(datetime.now(UTC) - parse_timestamp(at)) < timedelta(minutes=5)


@contextmanager
def client(stack: Stack, gateway: int) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.urls[gateway], timeout=PATIENCE_S) as found:

        def is_ready() -> bool:
            try:
                return found.get("/readyz").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(is_ready, "the gateway is ready")
        yield found


def test_a_clock_can_be_shifted(tmp_path: Path) -> None:
    """What the tests below rest on."""
    ask = "import time; print(time.time(), time.monotonic())"
    environment = shifted_clock(tmp_path, HOUR_S)
    said = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert 3500 < float(said.split()[0]) - datetime.now(UTC).timestamp() < 3700


def test_sequences_begin_at_the_brokers_time(tmp_path: Path) -> None:
    """Those of the requests: a gateway with another clock that creates the stream again later
    would otherwise give sequences out for a second time."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(**shifted_clock(tmp_path, 24 * HOUR_S)).wait_for("gateway_ready")
        first = asyncio.run(_first_sequence(stack, "REQUESTS"))
    assert abs(first / 1000 - datetime.now(UTC).timestamp()) < 300


@pytest.mark.parametrize("shift_s", [HOUR_S, -HOUR_S])
def test_a_gateway_with_a_wrong_clock_gives_true_times(
    tmp_path: Path, shift_s: int, tiny_model: Path
) -> None:
    """It expires no job by reading it, and the deadlines it makes are true for the others;
    its times and ids are the broker's."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny")
        stack.start_gateway(GATEWAY_MODELS="tiny", **shifted_clock(tmp_path, shift_s))
        with client(stack, 0) as right, client(stack, 1) as wrong:
            first = right.post("/jobs", json={**SHORT, "timeout_s": 60}).json()["id"]
            second = wrong.post("/jobs", json={**SHORT, "timeout_s": 60}).json()["id"]
            for job_id in (first, second):
                for gateway in (wrong, right):
                    status = gateway.get(f"/status/{job_id}").json()
                    assert status["state"] == "PENDING", status
                    assert is_about_now(status["queued_at"])
            # Both expire when their time has come, by the first process that checks.
            brief = [g.post("/jobs", json={**SHORT, "timeout_s": 0.5}) for g in (right, wrong)]
            for answer, gateway in zip(brief, (wrong, right), strict=True):
                path = answer.headers["location"]

                def ended(gateway: httpx2.Client = gateway, path: str = path) -> object:
                    return gateway.get(path).json()["state"] == "FAILURE"

                eventually(ended, "it has expired")
                status = gateway.get(path).json()
                assert status["error"]["code"] == "deadline_passed"
                assert is_about_now(status["finished_at"])
            stack.start_inferer(tiny_model)
            for job_id in (first, second):
                assert stack.wait_for_end(job_id)["state"] == "SUCCESS"


@pytest.mark.parametrize("shift_s", [HOUR_S, -HOUR_S])
def test_an_inferer_with_a_wrong_clock_runs_jobs_and_gives_true_times(
    tmp_path: Path, shift_s: int, tiny_model: Path
) -> None:
    """It runs a job whose deadline has not passed; what it says of it is true, and the estimates
    that are made of it are, too."""
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        stack.start_inferer(tiny_model, **shifted_clock(tmp_path, shift_s))
        stack.wait_until_served("tiny")
        for _ in range(3):
            status = stack.wait_for_end(stack.submit(**SHORT, timeout_s=600))
            assert status["state"] == "SUCCESS", status
            assert is_about_now(status["started_at"])
            assert is_about_now(status["finished_at"])
            assert 0 <= status["timings"]["queued_ms"] < 300_000
            assert 0 < status["timings"]["total_ms"] < 300_000
        running = stack.submit(**LONG, timeout_s=600)
        stack.wait_for_state(running, "STARTED")
        waiting = stack.status(stack.submit(**SHORT, timeout_s=600))
        assert 0 <= waiting["eta"]["p50_s"] <= waiting["eta"]["p90_s"] < 600
        assert is_about_now(waiting["eta"]["at"])
        stack.http.delete(f"/jobs/{running}")


def test_a_key_stands_for_its_job_whatever_the_clock(tmp_path: Path) -> None:
    """A gateway that is 25 hours ahead would take every key of the others for expired, and run
    their jobs a second time."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MODELS="tiny")
        stack.start_gateway(GATEWAY_MODELS="tiny", **shifted_clock(tmp_path, 25 * HOUR_S))
        with client(stack, 0) as right, client(stack, 1) as wrong:
            headers = {"Idempotency-Key": "one"}
            ids = {
                gateway.post("/jobs", json=SHORT, headers=headers).json()["id"]
                for gateway in (right, wrong, right)
            }
            assert len(ids) == 1


async def _first_sequence(stack: Stack, stream: str) -> int:
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        return (await broker.js.stream_info(stream)).state.first_seq
