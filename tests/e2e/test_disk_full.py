"""A disk without a free byte under the broker: nothing that was accepted is lost, nobody gets
what is not true, and everybody serves again by themselves."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shared.broker.connection import connected
from shared.config import BrokerSettings
from tests.support.disk import SIZE_BYTES, Disk, small_disk
from tests.support.doctor import examine
from tests.support.processes import Stack, eventually
from tests.support.up import Up

BULKY: dict[str, Any] = {"prompt": "hi", "max_tokens": 2, "metadata": {"filler": "x" * 4000}}
"""No end of a page that is on the disk already has room for it."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Where a broker whose folder is ``tmp_path / "nats"`` keeps its streams."""
    with small_disk(tmp_path / "nats" / "jetstream") as mounted:
        yield mounted


def test_a_full_disk_is_reported_and_jobs_go_on_once_there_is_space(
    disk: Disk, tmp_path: Path, tiny_model: Path
) -> None:
    """While one job runs and two wait: 503 to all that comes, the answer is kept, doctor names the
    cause; and once there is room and the broker has been restarted each job ends once."""
    with Stack(tmp_path, store="20MB") as stack:
        gateway, inferer = stack.start_gateway(), stack.start_inferer(tiny_model)
        stack.wait_until_served("tiny")
        ids = [stack.submit(prompt="long", max_tokens=1000)]
        ids += [stack.submit(prompt=f"job {number}", max_tokens=5) for number in range(2)]
        stack.wait_for_state(ids[0], "STARTED")
        disk.fill()

        assert _code(_refused(stack.http, "/jobs")) == "broker_unavailable"  # nobody knew yet
        eventually(lambda: _code(stack.http.get("/readyz")) == "storage_short", "it is seen")
        for path in ("/jobs", "/v1/completions"):
            assert _code(_refused(stack.http, path)) == "storage_short"
        assert stack.http.get("/healthz").status_code == 200
        inferer.wait_for("broker_awaited")  # it has an answer, and nobody to give it to
        assert [stack.status(job_id)["state"] for job_id in ids] == ["STARTED"] + ["PENDING"] * 2
        found = examine(stack)
        assert "cannot be written any more: no space left on device" in found["storage"][0]["found"]
        assert "free space" in found["storage"][0]["advice"]
        assert "no space left on device" in found["gateway"][0]["found"]
        assert found.keys() == {"gateway", "broker", "storage"}

        disk.relieve()
        assert stack.nats.process.terminate() == 0
        stack.nats.start()
        eventually(lambda: stack.http.get("/readyz").status_code == 200, "it is ready again")
        ended = [stack.wait_for_end(job_id) for job_id in ids]
        assert [(job["state"], job["attempts"]) for job in ended] == [("SUCCESS", 1)] * 3
        assert stack.wait_for_end(stack.submit(**BULKY))["state"] == "SUCCESS"
        assert len(gateway.events("storage_unwritable")) == 1
        assert len(inferer.events("broker_awaited")) == 1
        for process in (gateway, inferer):
            assert "Traceback" not in process.output()


def test_sluice_up_restarts_a_broker_that_has_given_up(
    tmp_path: Path, tiny_model: Path, ups: list[Up]
) -> None:
    """It says that the disk is full; as soon as there is room it serves again without anybody's
    help, and the job that was running meanwhile ends once."""
    with small_disk(tmp_path / "data" / "nats") as disk:
        up = Up(tmp_path / "data", tiny_model)
        ups.append(up)
        up.wait_until_ready()
        assert 0 < asyncio.run(_storage_limit(up.nats_url)) <= SIZE_BYTES // 2
        job_id = up.submit(prompt="long", max_tokens=1000)
        up.wait_for_state(job_id, "STARTED")
        disk.fill()
        _refused(up.http, "/jobs")
        (printed,) = eventually(lambda: up.events("disk_full") or None, up.stderr)
        assert printed["folder"] == str(disk.folder)
        assert up.http.get("/readyz").status_code == 503
        disk.relieve()
        eventually(lambda: up.http.get("/readyz").status_code == 200, "it serves again")
        ended = up.wait_for_state(job_id, "SUCCESS", "FAILURE")
        assert (ended["state"], ended["attempts"]) == ("SUCCESS", 1)
        assert len(up.starts_of("nats")) == 2
        assert len(up.events("disk_full")) == 1
        assert up.stop() == 0
        assert "Traceback" not in up.stderr


async def _storage_limit(nats_url: str) -> int:
    async with connected(BrokerSettings(url=nats_url), "test") as broker:
        return (await broker.js.account_info()).limits.max_storage


def _refused(http: httpx2.Client, path: str) -> httpx2.Response:
    """The answer to a job that cannot be stored."""
    answer = http.post(path, json=BULKY)
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    return answer


def _code(answer: httpx2.Response) -> str | None:
    body = answer.json()
    code: str | None = body.get("code") or body.get("error", {}).get("code")
    return code
