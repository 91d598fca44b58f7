"""`sluice doctor` names the cause, and what to do about it."""

import asyncio
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.broker import connected
from shared.config import BrokerSettings
from shared.cpus import usable_cpus
from tests.processes import PATIENCE_S, Stack, clean_environment, eventually, free_port, scripts

Finding = dict[str, Any]


def examine(stack: Stack) -> dict[str, list[Finding]]:
    """The findings by what they are about; the exit status says whether something is wrong."""
    command = [str(scripts() / "sluice"), "doctor", "--url", stack.url]
    done = subprocess.run(
        [*command, "--nats-url", stack.nats.url, "--json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    findings = json.loads(done.stdout)["findings"]
    is_wrong = any(finding["verdict"] == "wrong" for finding in findings)
    assert (done.returncode, done.stderr) == (int(is_wrong), "")
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        assert (finding["advice"] is None) == (finding["verdict"] == "ok")
        found.setdefault(finding["about"], []).append(finding)
    return found


def test_all_is_well(stack: Stack) -> None:
    """Exit status 0, and every question has been asked."""
    found = examine(stack)
    assert {"gateway", "broker", "streams", "tiny", "dead letters"} <= found.keys()
    assert {finding["verdict"] for one in found.values() for finding in one} == {"ok"}


def test_the_broker_is_down(stack: Stack) -> None:
    stack.nats.process.kill()
    eventually(lambda: stack.http.get("/readyz").status_code == 503, "the gateway has noticed")
    found = examine(stack)
    assert found["broker"][0]["verdict"] == "wrong"
    assert stack.nats.url in found["broker"][0]["found"]
    assert found["gateway"][0]["verdict"] == "wrong"


def test_no_gateway(stack: Stack) -> None:
    """The rest is looked at all the same."""
    stack.urls[0] = f"http://127.0.0.1:{free_port()}"
    found = examine(stack)
    assert found["gateway"][0]["verdict"] == "wrong"
    assert found["tiny"][0]["verdict"] == "ok"


def test_no_inferer(stack: Stack) -> None:
    """With how many jobs wait for one."""
    stack.inferers.pop().terminate()
    stack.submit(prompt="hi")
    stack.submit(prompt="hi")
    (finding,) = examine(stack)["tiny"]
    assert finding["verdict"] == "wrong"
    assert finding["found"].startswith("no live inferer; 2 waiting")


def test_no_inferer_and_no_job(stack: Stack) -> None:
    """Nothing is wrong: so it is with `sluice up --min 0` while nobody asks for anything."""
    stack.inferers.pop().terminate()
    (finding,) = examine(stack)["tiny"]
    assert finding["verdict"] == "look"
    assert finding["found"] == "no live inferer, and no job"


def test_an_inferer_that_hangs(stack: Stack) -> None:
    """One that was stopped says nothing any more."""
    stack.inferers[0].popen.send_signal(signal.SIGSTOP)
    found = eventually(lambda: _silent(stack), "it is missed", patience_s=20)
    assert "end its process" in str(found["advice"])
    stack.inferers[0].popen.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("loss", ["setting", "stream"])
async def test_streams_that_are_not_as_they_should_be(stack: Stack, loss: str) -> None:
    """A bound somebody has set, a stream somebody has removed: named, with the command."""
    stack.gateways[0].popen.send_signal(signal.SIGSTOP)  # it would mend the second by itself
    stack.urls[0] = f"http://127.0.0.1:{free_port()}"
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        if loss == "stream":
            await broker.js.delete_stream("RESULTS")
        else:
            config = (await broker.js.stream_info("REQUESTS")).config
            config.max_msgs = 10
            await broker.js.update_stream(config)
    streams = (await asyncio.to_thread(examine, stack))["streams"]
    assert [finding["verdict"] for finding in streams] == ["wrong"]
    wanted = "RESULTS: missing" if loss == "stream" else "REQUESTS: max_msgs is 10"
    assert wanted in streams[0]["found"]
    assert streams[0]["advice"] == "run: sluice topology apply"


def test_inferers_that_share_cpus(stack: Stack, tiny_model: Path) -> None:
    """Named with their threads and the CPUs there are."""
    stack.start_inferer(tiny_model, INFERER_THREADS=str(usable_cpus()))
    stack.wait_until_served("tiny", inferers=2)
    (finding,) = examine(stack)["CPUs"]
    assert finding["verdict"] == "wrong"
    assert "inferer-0 and inferer-1" in finding["found"]


def _silent(stack: Stack) -> Finding | None:
    found = examine(stack).get("inferer inferer-0", [])
    return next((one for one in found if "has said nothing" in one["found"]), None)
