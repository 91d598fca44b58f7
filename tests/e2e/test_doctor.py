"""`sluice doctor` names the cause, and what to do about it."""

import asyncio
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from nats.js.api import ConsumerConfig

from cli.doctor import examination
from shared.broker.connection import Broker, connected
from shared.broker.consumers import consumer
from shared.config import BrokerSettings
from shared.cpus import usable_cpus
from tests.support.doctor import Finding, examine
from tests.support.processes import (
    NatsServer,
    Stack,
    clean_environment,
    eventually,
    free_port,
    scripts,
)


def test_nothing_is_found_where_all_is_well(stack: Stack) -> None:
    """Exit status 0, and every question has been asked."""
    found = examine(stack)
    asked = {"gateway", "broker", "storage", "streams", "consumers", "tiny", "CPUs", "versions"}
    assert {*asked, "dead letters", "inferer inferer-0"} == found.keys()
    assert {finding["severity"] for one in found.values() for finding in one} == {"ok"}


def test_a_broker_that_is_down_is_found(stack: Stack) -> None:
    stack.nats.process.kill()
    eventually(lambda: stack.http.get("/readyz").status_code == 503, "the gateway has noticed")
    found = examine(stack)
    assert found["broker"][0]["severity"] == "error"
    assert stack.nats.url in found["broker"][0]["found"]
    assert found["gateway"][0]["severity"] == "error"


async def test_a_broker_without_a_storage_limit_is_found(tmp_path: Path) -> None:
    """One that was not started with our configuration: the danger is named."""
    configuration = tmp_path / "nats.conf"
    configuration.write_text("jetstream: enabled")
    with NatsServer(tmp_path / "nats", configuration) as server:
        nobody = f"http://127.0.0.1:{free_port()}"
        findings = await examination.examine(BrokerSettings(url=server.url), nobody, replicas=1)
    (finding,) = (one for one in findings if one.about == "storage")
    assert finding.severity == "warning"
    assert finding.found.startswith("0 MiB used, and no limit")


def test_a_missing_gateway_is_found(stack: Stack) -> None:
    """The rest is checked all the same."""
    stack.urls[0] = f"http://127.0.0.1:{free_port()}"
    found = examine(stack)
    assert found["gateway"][0]["severity"] == "error"
    assert found["tiny"][0]["severity"] == "ok"


def test_doctor_finds_the_broker_by_the_gateway_alone(stack: Stack) -> None:
    """Its broker is not the one at the default address, so none is examined."""
    environment = {**clean_environment(), "SLUICE_URL": stack.url}
    done = subprocess.run(
        [scripts() / "sluice", "doctor", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    gateway, broker = json.loads(done.stdout)["findings"]
    assert (gateway["about"], gateway["severity"]) == ("gateway", "ok")
    assert (broker["about"], broker["severity"]) == ("broker", "warning")
    assert "--nats-url" in broker["advice"]


def test_a_queue_without_an_inferer_is_found(stack: Stack) -> None:
    """With how many jobs wait for one, and how long the oldest has."""
    stack.inferers.pop().terminate()
    stack.submit(prompt="hi", priority="low")
    stack.submit(prompt="hi")
    (finding,) = examine(stack)["tiny"]
    assert finding["severity"] == "error"
    assert finding["found"].startswith("no live inferer; 2 waiting, the oldest for ")
    assert "sluice up" in finding["advice"]


def test_a_model_without_inferer_and_jobs_is_not_an_error(stack: Stack) -> None:
    """Nothing is wrong: so it is with `sluice up --min 0` while nobody asks for anything."""
    stack.inferers.pop().terminate()
    (finding,) = examine(stack)["tiny"]
    assert finding["severity"] == "warning"
    assert finding["found"] == "no live inferer and no jobs"


def test_an_inferer_that_hangs_is_found(stack: Stack) -> None:
    """A stopped one sends no heartbeats; doctor also reports how long its job has run. The advice
    is still right when its entry has expired."""
    stack.submit(prompt="go on", max_tokens=4000)
    eventually(lambda: _inferer(stack)["jobs"] or None, "it runs")
    stack.inferers[0].freeze()
    found = eventually(lambda: _silent(stack), "it is missed", patience_s=20)
    assert "end its process" in found["inferer inferer-0"][0]["advice"]
    printed = [finding["found"] for finding in found["tiny"]]
    assert any("the longest-running job started" in one for one in printed)

    def without_entry() -> dict[str, list[Finding]] | None:
        found = examine(stack)
        return found if found["tiny"][0]["found"].startswith("no live inferer") else None

    # Another `sluice up` would be refused.
    found = eventually(without_entry, "its entry has expired")
    assert "end the process of one that hangs" in found["tiny"][0]["advice"]
    stack.inferers[0].thaw()


@pytest.mark.parametrize("loss", ["setting", "stream"])
async def test_streams_with_other_settings_are_found(stack: Stack, loss: str) -> None:
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
    assert [finding["severity"] for finding in streams] == ["error"]
    wanted = "RESULTS: missing" if loss == "stream" else "REQUESTS: max_msgs is 10"
    assert wanted in streams[0]["found"]
    assert streams[0]["advice"] == "run: sluice topology apply"


async def test_consumers_with_other_settings_are_found(stack: Stack) -> None:
    """Missing, set otherwise, paused, somebody else's, with a limit of its own: each is named with
    what mends it; and that mends it."""
    stack.gateways[0].popen.send_signal(signal.SIGSTOP)  # it would mend some by itself
    url, stack.urls[0] = stack.urls[0], f"http://127.0.0.1:{free_port()}"
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        await broker.js.delete_consumer("REQUESTS", "tiny+high")
        changed = consumer("tiny", "normal", 60.0, 1, None)
        changed.max_batch, changed.backoff = 5, [60.0, 70.0]
        changed.max_deliver = 3
        await broker.js.add_consumer("REQUESTS", changed)
        await broker.js.add_consumer("REQUESTS", consumer("tiny", "low", 12.0, 7, None))
        await _pause(broker, "tiny+low", "2100-01-01T00:00:00Z")
        theirs = ConsumerConfig(durable_name="audit", filter_subject="infer.requests.other.*.*.*")
        await broker.js.add_consumer("REQUESTS", theirs)
        found = await asyncio.to_thread(examine, stack)
        advice = {one["found"].partition(":")[0]: one["advice"] for one in found["consumers"]}
        assert "a gateway creates it" in advice.pop("tiny+high")
        assert advice == {
            "tiny": "run: sluice topology apply",
            "tiny+low": "run: nats consumer resume REQUESTS tiny+low",
            "audit": "run: nats consumer rm REQUESTS audit",
        }
        (settings,) = (one["found"] for one in found["consumers"] if "ack_wait" in one["found"])
        assert "ack_wait is 60 s, should be 12 s" in settings
        assert "max_batch is 5, should be 1" in settings
        assert "max_deliver is 3, should be -1" in settings
        assert "backoff is [60000000000, 70000000000], should be unset" in settings
        (limit,) = (one for one in found["tiny"] if one["severity"] == "error")
        assert limit["found"] == "the limit is 1 or 7, the live slots are 1"

        await broker.js.delete_consumer("REQUESTS", "audit")
        await _pause(broker, "tiny+low", None)
    apply = [str(scripts() / "sluice"), "topology", "apply", "--nats-url", stack.nats.url]
    await asyncio.to_thread(subprocess.run, apply, env=clean_environment(), check=True)
    stack.gateways[0].popen.send_signal(signal.SIGCONT)
    stack.urls[0] = url
    found = await asyncio.to_thread(examine, stack)
    assert {finding["severity"] for one in found.values() for finding in one} == {"ok"}


async def test_a_queue_that_stands_still_is_found(stack: Stack) -> None:
    """Jobs wait beside a free slot: here because somebody has paused the consumer."""
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        await _pause(broker, "tiny", "2100-01-01T00:00:00Z")
        stack.submit(prompt="hi")
        found = await asyncio.to_thread(examine, stack)
    assert [finding["severity"] for finding in found["tiny"]] == ["ok", "error"]
    assert "1 waiting although a slot is free" in found["tiny"][1]["found"]
    assert "tiny: paused until 2100" in found["consumers"][0]["found"]


def test_inferers_without_open_slots_are_found(stack: Stack) -> None:
    """With the command that opens them."""
    stack.http.put("/concurrency", json={"concurrency": 0})
    stack.submit(prompt="hi")
    eventually(lambda: _inferer(stack)["slots"] == 0, "it says so")
    found = examine(stack)["tiny"]
    assert [finding["severity"] for finding in found] == ["ok", "error"]
    assert "all slots are closed" in found[1]["found"]
    assert "sluice concurrency 1 --model tiny" in found[1]["advice"]


async def test_different_versions_and_dead_letters_are_found(stack: Stack) -> None:
    """An inferer of another version, and a job that was given up: both are reported as warnings."""
    other = {**_inferer(stack), "id": "old", "version": "0.0.1", "cpus": []}
    async with connected(BrokerSettings(url=stack.nats.url), "test") as broker:
        await broker.js.publish("$KV.INFERERS.tiny.old", json.dumps(other).encode())
        await broker.js.publish("infer.dead.tiny.x", b"{}")
        found = await asyncio.to_thread(examine, stack)
    assert "inferers 0.0.1, " in found["versions"][0]["found"]
    assert found["versions"][0]["found"].startswith("gateway ")
    assert found["versions"][0]["severity"] == "warning"
    assert (found["dead letters"][0]["severity"], found["dead letters"][0]["found"]) == (
        "warning",
        "1",
    )


def test_inferers_that_share_cpus_are_found(stack: Stack, tiny_model: Path) -> None:
    """Named with their threads and the CPUs there are."""
    stack.start_inferer(tiny_model, INFERER_THREADS=str(usable_cpus()))
    stack.wait_until_served("tiny", inferers=2)
    (finding,) = examine(stack)["CPUs"]
    assert finding["severity"] == "error"
    assert "inferer-0 and inferer-1" in finding["found"]


async def _pause(broker: Broker, consumer_name: str, until: str | None) -> None:
    """None resumes it."""
    body = json.dumps({"pause_until": until} if until else {}).encode()
    answer = await broker.nc.request(f"$JS.API.CONSUMER.PAUSE.REQUESTS.{consumer_name}", body)
    assert json.loads(answer.data)["paused"] == bool(until), answer.data


def _inferer(stack: Stack) -> dict[str, Any]:
    (entry,) = stack.http.get("/inferers").json()["inferers"]
    return dict(entry)


def _silent(stack: Stack) -> dict[str, list[Finding]] | None:
    """All findings, once the inferer's silence is among them."""
    found = examine(stack)
    printed = found.get("inferer inferer-0", [])
    return found if any("no heartbeat" in one["found"] for one in printed) else None


def test_a_full_queue_is_found(tmp_path: Path, tiny_model: Path) -> None:
    """With the bound, and that new jobs are refused."""
    with Stack(tmp_path) as stack:
        stack.start_gateway(GATEWAY_MAX_WAITING="2")
        stack.start_inferer(tiny_model)
        stack.wait_until_served("tiny")
        stack.http.put("/concurrency", json={"concurrency": 0}).raise_for_status()
        for _ in range(2):
            stack.submit(prompt="hi")
        printed = [one for one in examine(stack)["tiny"] if "the queue is full" in one["found"]]
    (finding,) = printed
    assert finding["severity"] == "error"
    assert "2 waiting, the limit is 2" in finding["found"]
    assert "GATEWAY_MAX_WAITING" in str(finding["advice"])
