"""`sluice up` with several models, and with models by their names on the Hugging Face hub."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

from shared.counts import counted
from shared.cpus import own_cpus, usable_cpus
from tests.support.hub import Hub, hub_environment
from tests.support.processes import (
    PATIENCE_S,
    Process,
    Stack,
    clean_environment,
    eventually,
    free_port,
    scripts,
)
from tests.support.terminal import terminal
from tests.support.tiny_model import write_tiny_model
from tests.support.up import Up

Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path, ups: list[Up]) -> Start:
    """`sluice up` with models and options."""

    def start(models: list[str], *options: str, **environment: str) -> Up:
        first, *others = models
        named = [text for model in others for text in ("--model", model)]
        up = Up(tmp_path / "data", first, *named, *options, **environment)
        ups.append(up)
        return up

    return start


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with Hub() as running:
        running.add("o/r", **{"tiny-Q8_0.gguf": tiny_model.read_bytes()})
        yield running


def inferers(up: Up) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in up.http.get("/inferers").json()["inferers"]}


def ask(up: Up, **body: Any) -> dict[str, Any]:
    answer = up.http.post(
        "/jobs", json={"prompt": "hi", "max_tokens": 2, **body}, headers={"prefer": "wait=30"}
    )
    found: dict[str, Any] = answer.json()
    assert found.get("state") == "SUCCESS", answer.text
    return found


def check_unnamed_is_refused(up: Up, *names: str) -> None:
    """A request without a model: over HTTP in both forms and over NATS, with the names."""
    for path in ("/jobs", "/v1/completions"):
        answer = up.http.post(path, json={"prompt": "hi", "max_tokens": 2})
        assert answer.status_code in (400, 422), answer.text
        assert f"name one of {', '.join(names)}" in answer.text
    assert f"name one of {', '.join(names)}" in asyncio.run(_error_over_nats(up.nats_url))


async def _error_over_nats(url: str) -> str:
    connection = await nats.connect(url)
    try:
        reply = await connection.request("infer.submit", b'{"prompt": "hi"}', timeout=PATIENCE_S)
        return (reply.headers or {}).get("Nats-Service-Error", "")
    finally:
        await connection.close()


def test_two_models_have_inferers_and_cpus_of_their_own(
    start: Start, tiny_model: Path, tiny_base_model: Path
) -> None:
    """Each has an inferer; the CPUs are divided among them. Jobs go by name; one without a name is
    refused."""
    up = start([f"org/first:1={tiny_model}", str(tiny_base_model)]).wait_until_ready()
    found = inferers(up)
    assert {one: entry["model"] for one, entry in found.items()} == {
        "inferer-1": "org/first:1",
        "inferer-2": "tiny-base",
    }
    cpus = own_cpus()[: usable_cpus()]
    shares = [entry["cpus"] for entry in found.values()]
    assert sorted(cpu for share in shares for cpu in share) == cpus
    for model, inferer in (("org/first:1", "inferer-1"), ("tiny-base", "inferer-2")):
        status = ask(up, model=model)
        assert (status["model"], status["inferer"]) == (model, inferer)
    served = {model["id"] for model in up.http.get("/v1/models").json()["data"]}
    assert served == {"org/first:1", "tiny-base"}
    check_unnamed_is_refused(up, "org/first:1", "tiny-base")
    assert up.stop() == 0


def test_each_model_is_scaled_by_its_own_queue(
    start: Start, tiny_model: Path, tiny_base_model: Path
) -> None:
    """Without inferers first; a job of one model starts an inferer of that one alone, which leaves
    again. Which model an unnamed job means does not depend on that."""
    models = [f"a={tiny_model}", f"b={tiny_base_model}"]
    up = start(models, "--min", "0", "--max", "1", "--idle-s", "3").wait_until_ready()
    check_unnamed_is_refused(up, "a", "b")
    for model, inferer in (("b", "inferer-2"), ("a", "inferer-1")):
        assert ask(up, model=model)["inferer"] == inferer
        assert set(inferers(up)) >= {inferer}
        check_unnamed_is_refused(up, "a", "b")
        eventually(lambda: inferers(up) == {}, f"it leaves\n{up.stderr}")
    started = [event["inferer"] for event in up.events("inferer_scaled_up")]
    assert started == ["inferer-2", "inferer-1"]


def test_models_that_cannot_be_served_are_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Path
) -> None:
    """One line that names the option and says what to do, exit status 2, and nothing is created."""
    other = tmp_path / "other" / "tiny.gguf"
    other.parent.mkdir()
    other.symlink_to(tiny_model)
    (tmp_path / "text.gguf").write_text("not a model")
    whole = tiny_model.read_bytes()
    (tmp_path / "header.gguf").write_bytes(whole[:2000])
    (tmp_path / "tensors.gguf").write_bytes(whole[:-2000])
    count = usable_cpus()
    good, data = str(tiny_model), tmp_path / "data"
    cases: list[tuple[list[str], dict[str, str], str]] = [
        ([good, f"{tmp_path}/missing.gguf"], {}, "missing.gguf does not exist"),
        ([good, f"b={tmp_path}/text.gguf"], {}, "text.gguf is not a GGUF file"),
        ([f"{tmp_path}/header.gguf"], {}, "damaged: it ends in the middle of its header"),
        ([good, f"b={tmp_path}/tensors.gguf"], {}, "damaged: it ends before its last tensor"),
        ([good, str(other)], {}, "would both be served as tiny: give each a name"),
        ([f"x={good}", f"x={other}"], {}, "would both be served as x: give each a name"),
        ([good, f"b={good}"], {"INFERER_ALIAS": "x"}, "INFERER_ALIAS names one model"),
        (
            [good, f"b={good}"],
            {"INFERER_ADAPTERS": "x"},
            "INFERER_ADAPTERS cannot be used with several models",
        ),
        ([f"={good}"], {}, "'' is not a valid name"),
        ([f"a ={good}"], {}, "'a ' is not a valid name"),
        (["a="], {}, "--model a=: give NAME=MODEL"),
        (["hf:r"], {}, "is not a name on the Hugging Face hub"),
        ([f"m{n}={good}" for n in range(count + 1)], {}, f" inferers on {counted(count, 'CPU')}:"),
    ]
    for models, environment, sentence in cases:
        ended = subprocess.run(
            [
                *(str(scripts() / "sluice"), "up", "--port", "0", "--nats-port", "0"),
                *("--data", str(data)),
                *(text for model in models for text in ("--model", model)),
            ],
            env={**clean_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert sentence in ended.stderr
        assert ended.stderr.count("\n") == 1
        assert not data.exists()


def test_a_path_may_contain_an_equals_sign(start: Start, tiny_model: Path, tmp_path: Path) -> None:
    """If it is there; then it has no name before it."""
    path = tmp_path / "a=b.gguf"
    path.symlink_to(tiny_model)
    up = start([str(path)]).wait_until_ready()
    assert ask(up, model="a-b")["inferer"] == "inferer-1"


def test_a_model_of_the_hub_is_downloaded_once_for_all_inferers(
    start: Start, hub: Hub, tmp_path: Path
) -> None:
    """By the time they start it is there; it is served under its name without `hf:`. The next
    start needs no hub."""
    count = str(usable_cpus())
    up = start(["hf:o/r:Q8_0"], "--inferers", count, **hub_environment(tmp_path, hub.url))
    up.wait_until_ready()
    assert ask(up, model="o/r:Q8_0")["model"] == "o/r:Q8_0"
    assert len(hub.bodies()) == 1
    assert (
        up.events("model_downloaded")[0]["timestamp"] < up.events("child_started")[0]["timestamp"]
    )
    assert up.stop() == 0
    asked = len(hub.requests)
    up = start(["hf:o/r:Q8_0"], **hub_environment(tmp_path, hub.url, HF_HUB_OFFLINE="1"))
    up.wait_until_ready()
    assert ask(up)["model"] == "o/r:Q8_0"
    assert len(hub.requests) == asked


def test_a_split_model_of_the_hub_is_served(start: Start, hub: Hub, tmp_path: Path) -> None:
    """llama.cpp finds the other parts beside the first, where the cache has links to them."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_tiny_model(folder / "tiny.gguf", tensors_per_part=8)
    parts = {part.name: part.read_bytes() for part in folder.iterdir()}
    assert len(parts) > 1
    hub.add("o/split", **parts)
    up = start(["x=hf:o/split"], **hub_environment(tmp_path, hub.url)).wait_until_ready()
    assert ask(up, model="x")["state"] == "SUCCESS"
    assert len(hub.bodies()) == len(parts)


def test_without_network_the_start_is_refused(start: Start, tmp_path: Path) -> None:
    """One line that says what to do, and exit status 2; nothing was started."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    up = start(["hf:o/r"], **hub_environment(tmp_path, nowhere))
    assert up.popen.wait(PATIENCE_S) == 2
    *events, line = up.stderr.splitlines()
    assert line.startswith("sluice: the model hf:o/r is not on this machine, and cannot be")
    assert f" {nowhere} (ConnectError: " in line
    assert line.endswith("or give the path of a GGUF file")
    assert [event["event"] for event in up.events("model_download_started")]
    assert len(events) == 1, up.stderr


def test_a_stop_in_the_middle_of_a_download(start: Start, hub: Hub, tmp_path: Path) -> None:
    """It ends at once, and no process is left; the next start gets the rest of the file. (The
    library writes 10 MiB at a time, and this file is smaller: it is asked for from 0.)"""
    hub.hang_after = 1
    environment = hub_environment(tmp_path, hub.url)
    up = start(["hf:o/r"], **environment)
    assert hub.hangs.wait(PATIENCE_S)
    assert up.stop(signal.SIGINT) == 0
    assert not up.events("child_started")
    up = start(["hf:o/r"], **environment).wait_until_ready()
    ask(up)


def test_an_inferer_started_by_hand_downloads_its_model(hub: Hub, tmp_path: Path) -> None:
    """A signal ends it in the middle of the download, with status 0. Its health check finds it
    under the same name. What it cannot download ends it with one line and status 2."""
    hub.hang_after = 1
    command = [sys.executable, "-m", "services.inferer"]
    with Stack(tmp_path) as stack:
        stack.start_gateway()
        environment = {
            **hub_environment(tmp_path / "cache", hub.url),
            "NATS_URL": stack.nats.url,
            "INFERER_MODEL": "hf:o/r:q8_0",
            "INFERER_THREADS": "1",
        }
        first = Process(command, tmp_path / "first.log", environment)
        assert hub.hangs.wait(PATIENCE_S)
        assert first.terminate() == 0
        second = Process(command, tmp_path / "second.log", environment)
        try:
            second.wait_for("inferer_ready")
            eventually(lambda: stack.http.get("/queue").json()["models"], "it is served")
            job_id = stack.submit(prompt="hi", max_tokens=2, model="o/r:q8_0")
            assert stack.wait_for_end(job_id)["state"] == "SUCCESS"
            health = [sys.executable, "-m", "services.inferer.health"]
            assert Process(health, tmp_path / "health.log", environment).wait() == 0
        finally:
            second.terminate()
        missing = {**environment, "INFERER_MODEL": "hf:o/r:q4_0", "HF_HUB_OFFLINE": "1"}
        third = Process(command, tmp_path / "third.log", missing)
        assert third.wait() == 2
        (line,) = (one for one in third.output().splitlines() if not one.startswith("{"))
        assert line.startswith("inferer: the model hf:o/r:q4_0 is not on this machine, and HF_HUB_")


def test_a_download_shows_its_progress_on_a_terminal(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, and how much of it is there; it can be interrupted."""
    hub.hang_after = 1
    for name, value in hub_environment(tmp_path, hub.url).items():
        monkeypatch.setenv(name, value)
    options = ("--port", "0", "--nats-port", "0", "--data", str(tmp_path / "data"))
    with terminal("up", "--model", "hf:o/r", *options) as shown:
        assert hub.hangs.wait(PATIENCE_S)
        eventually(lambda: "tiny-Q8_0.gguf: " in shown.output, shown.output)
        assert "0.00/" in shown.output
        shown.type(b"\x03")
        assert shown.process.wait(PATIENCE_S) == 0
