"""What runs Sluice in containers, as far as it can be proven without an engine that runs them."""

import asyncio
import ipaddress
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from msgspec import Struct

from services.gateway.settings import GatewaySettings
from services.inferer.fleet.heartbeat import presence
from services.inferer.settings import InfererSettings
from shared.broker.connection import Broker
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings, load
from shared.timestamps import timestamp
from shared.wire.inferers import InfererEntry
from tests.support.processes import (
    ROOT,
    NatsServer,
    Process,
    Stack,
    clean_environment,
    eventually,
    free_port,
    scripts,
)

COMPOSE = ROOT / "compose.yaml"
CONTAINERFILE = ROOT / "Containerfile"
NATS_CONFIGURATION = ROOT / "deploy" / "nats" / "nats.conf"
MAX_PAYLOAD = 8 * 1024 * 1024

Configuration = dict[str, Any]
Compose = Callable[..., Configuration]


# compose.yaml


@pytest.fixture
def compose(tmp_path: Path) -> Compose:
    """``compose(*arguments, **environment)``: what the real parser makes of ``compose.yaml``."""
    command = shutil.which("docker-compose")
    if command is None:
        pytest.skip("needs docker-compose: apt-get install docker-compose")
    nothing = tmp_path / "empty.env"  # or a file .env of the developer's would count
    nothing.touch()

    def parse(*arguments: str, **environment: str) -> Configuration:
        done = subprocess.run(
            [command, "--file", str(COMPOSE), "--env-file", str(nothing), *arguments, "config"],
            cwd=ROOT,
            env={**_without_compose_settings(), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        found: Configuration = yaml.safe_load(done.stdout)
        return found

    return parse


def test_compose_starts_these_services(compose: Compose) -> None:
    """The real parser takes the file; the GPU is only asked for where its profile is wanted."""
    services = compose()["services"]
    assert {"nats", "gateway", "inferer"} <= set(services)
    assert all("profiles" not in services[name] for name in ("nats", "gateway", "inferer"))
    assert "deploy" not in services["inferer"]

    gpu = compose("--profile", "gpu")["services"]["inferer-gpu"]
    assert gpu["profiles"] == ["gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "-DGGML_CUDA=ON" in gpu["build"]["args"]["CMAKE_ARGS"]


def test_every_service_comes_back_and_is_checked(compose: Compose) -> None:
    """Each has a health check, is started again, and starts after what it cannot do without."""
    services = compose("--profile", "gpu")["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        check = service["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert _seconds(check["timeout"]) < _seconds(check["interval"]), name
    assert services["gateway"]["depends_on"]["nats"]["condition"] == "service_healthy"
    for name in ("inferer", "inferer-gpu"):
        needed = services[name]["depends_on"]
        assert needed["nats"]["condition"] == "service_healthy"
        # `up inferer-gpu` alone starts a gateway too, without which no streams would be there.
        assert needed["gateway"]["condition"] == "service_started"


def test_inferers_can_be_scaled(compose: Compose) -> None:
    """``--scale inferer=2``: nothing that only one of them could have; each with its share."""
    services = compose("--profile", "gpu")["services"]
    for name in ("inferer", "inferer-gpu"):
        inferer = services[name]
        assert not {"container_name", "hostname", "ports", "network_mode"} & set(inferer)
        assert "INFERER_ID" not in inferer["environment"]
        assert float(inferer["cpus"]) > 0


def test_a_job_has_its_time_when_an_inferer_stops(compose: Compose) -> None:
    """The container engine waits for longer than the grace: the job is requeued, not killed."""
    services = compose("--profile", "gpu")["services"]
    for name in ("inferer", "inferer-gpu"):
        grace_s = load(InfererSettings, "INFERER", services[name]["environment"]).grace_s
        patience_s = _seconds(services[name]["stop_grace_period"])
        assert patience_s >= max(grace_s, InfererSettings().grace_s) + 10
    gateway = services["gateway"]
    settings = load(GatewaySettings, "GATEWAY", gateway["environment"])
    assert _seconds(gateway["stop_grace_period"]) > 2 * settings.shutdown_s


def test_only_this_machine_can_come_in(compose: Compose) -> None:
    """Nothing has a password yet, so every published port is on loopback; nats' and HTTP's only."""
    services = compose("--profile", "gpu")["services"]
    published = {name: ports for name in services if (ports := _ports(services[name]))}
    assert set(published) == {"nats", "gateway"}
    assert {port for ports in published.values() for _, port, _ in ports} == {4222, 5001}
    for host, _, _ in (port for ports in published.values() for port in ports):
        assert ipaddress.ip_address(host).is_loopback


def test_data_outlives_the_containers(compose: Compose) -> None:
    """The streams are in a named volume, at the path that the server is given."""
    configuration = compose("--profile", "gpu")
    nats = configuration["services"]["nats"]
    folder = nats["command"][nats["command"].index("-sd") + 1]
    source, read_only = _mounts(nats)[folder]
    assert source in configuration["volumes"]
    assert not read_only
    for name in ("inferer", "inferer-gpu"):
        source, read_only = _mounts(configuration["services"][name])["/models"]
        assert source in configuration["volumes"]
        assert read_only


def test_the_broker_reads_our_configuration(compose: Compose) -> None:
    """The file that is mounted is ours, exists, cannot be written, and is the one it is given."""
    nats = compose()["services"]["nats"]
    read = nats["command"][nats["command"].index("-c") + 1]
    source, read_only = _mounts(nats)[read]
    assert Path(source) == NATS_CONFIGURATION
    assert NATS_CONFIGURATION.is_file()
    assert read_only


def test_every_variable_is_a_setting(compose: Compose) -> None:
    """What compose sets, the services know: `load` refuses other names, except for NATS_*."""
    services = compose("--profile", "gpu")["services"]
    assert load(GatewaySettings, "GATEWAY", services["gateway"]["environment"]).port == 5001
    for name in ("inferer", "inferer-gpu"):
        assert load(InfererSettings, "INFERER", services[name]["environment"]).model == "smollm2"
    for name in ("gateway", "inferer", "inferer-gpu"):
        environment = services[name]["environment"]
        assert {variable for variable in environment if variable.startswith("NATS_")} == {
            "NATS_URL"
        }
        assert load(BrokerSettings, "NATS", environment).url == "nats://nats:4222"
        assert all(key.startswith(("NATS_", "GATEWAY_", "INFERER_")) for key in environment), name


def test_the_environment_sets_models_cpus_and_ports(compose: Compose, tmp_path: Path) -> None:
    """Model, models' folder, CPUs, ports: from the environment, without editing the file."""
    services = compose(
        INFERER_MODEL="/models/mine.gguf",
        INFERER_CONCURRENCY="4",
        GATEWAY_MODELS="mine",
        SLUICE_MODELS=str(tmp_path),
        SLUICE_CPUS="1.5",
        SLUICE_PORT="8080",
        SLUICE_NATS_PORT="4333",
    )["services"]
    inferer = services["inferer"]
    settings = load(InfererSettings, "INFERER", inferer["environment"])
    assert (settings.model, settings.concurrency) == ("/models/mine.gguf", 4)
    assert _mounts(inferer)["/models"] == (str(tmp_path), True)
    assert float(inferer["cpus"]) == 1.5
    assert _ports(services["gateway"]) == [("127.0.0.1", 8080, 5001)]
    assert _ports(services["nats"]) == [("127.0.0.1", 4333, 4222)]
    gateway = load(GatewaySettings, "GATEWAY", services["gateway"]["environment"])
    assert gateway.model_names == ["mine"]


def test_the_gateways_check_tells_ready_from_not(stack: Stack) -> None:
    """The very command of ``compose.yaml``: 0 while requests are taken, not without the broker."""
    _, _, *arguments = _raw_compose()["services"]["gateway"]["healthcheck"]["test"]
    command = [sys.executable, *(_with_port(a, 5001, stack.http.base_url.port) for a in arguments)]

    def is_healthy() -> bool:
        # A proxy that is not there: the check must not ask one for its own loopback.
        environment = {**clean_environment(), "http_proxy": "http://127.0.0.1:9"}
        return subprocess.run(command, env=environment, capture_output=True).returncode == 0

    assert is_healthy()
    stack.nats.process.end()
    eventually(lambda: not is_healthy(), "the check fails without a broker")


# deploy/nats/nats.conf


async def test_the_broker_starts_with_the_arguments_of_sluice_up(
    nats_server: NatsServer, broker: Broker
) -> None:
    """With the flags of `sluice up`: they win over the file, whose limits and JetStream stay."""
    assert broker.nc.max_payload == MAX_PAYLOAD
    assert (await broker.js.account_info()).limits.max_storage == 10 * 1024**3
    (listening,) = re.findall(r"client connections on (\S+)", nats_server.process.output())
    assert listening == f"127.0.0.1:{nats_server.port}"
    assert "http monitor" not in nats_server.process.output()
    assert "[WRN]" not in nats_server.process.output()


async def test_the_broker_starts_with_the_arguments_of_compose(tmp_path: Path) -> None:
    """With the command of ``compose.yaml``, on other paths and ports: clients come in from
    everywhere, and what the health check asks answers, on loopback alone."""
    service = _raw_compose()["services"]["nats"]
    client_port, monitoring_port = free_port(), free_port()
    ours = {
        "nats-server": str(scripts() / "nats-server"),
        "/etc/nats/nats.conf": str(NATS_CONFIGURATION),
        "/data": str(tmp_path / "data"),
        "8222": str(monitoring_port),
    }
    assert set(ours) <= set(service["command"])
    command = [ours.get(word, word) for word in service["command"]]
    assert service["environment"].keys() == {"SLUICE_STORE"}
    check = _with_port(service["healthcheck"]["test"][-1], 8222, monitoring_port)
    server = Process([*command, "-p", str(client_port)], tmp_path / "log")
    try:
        eventually(lambda: "Server is ready" in server.output(), "nats-server is ready")
        assert f"client connections on 0.0.0.0:{client_port}" in server.output()
        async with httpx2.AsyncClient(trust_env=False) as client:
            assert (await client.get(check)).json() == {"status": "ok"}
            printed = (await client.get(httpx2.URL(check).copy_with(path="/varz"))).json()
        assert (printed["http_host"], printed["http_port"]) == ("127.0.0.1", monitoring_port)
        assert printed["max_payload"] == MAX_PAYLOAD
        assert Path(printed["jetstream"]["config"]["store_dir"]).is_relative_to(tmp_path / "data")
    finally:
        server.end()


# Containerfile


class Stage(Struct):
    """One ``FROM``, with what follows it as ``(instruction, arguments)``."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = []

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.instructions if name == instruction]


def test_every_service_has_a_target() -> None:
    """Compose builds targets that exist; each runs its service, in exec form, and not as root."""
    stages = _stages()
    services = _raw_compose()["services"]
    for name, service in services.items():
        if build := service.get("build"):
            assert build["dockerfile"] == CONTAINERFILE.name, name
            assert build["target"] in stages, name
            assert set(build["args"]) <= set(_build_arguments()), name
    for target in ("gateway", "inferer"):
        stage = stages[target]
        assert stage.all("CMD") == [f'["python", "-m", "services.{target}"]']
        (user,) = stage.all("USER")
        assert user.split(":")[0].isdecimal()
        assert int(user.split(":")[0]) > 0
        assert stage.all("STOPSIGNAL") == ["SIGTERM"]
        # Compose asks the same question, for images that carry no health check.
        (check,) = stage.all("HEALTHCHECK")
        asked = yaml.safe_load(check[check.index("CMD") + len("CMD") :])
        assert ["CMD", *asked] == services[target]["healthcheck"]["test"]


def test_images_hold_what_they_need_and_no_more() -> None:
    """No compiler beside the inferer; neither llama.cpp nor the inferer's code in the gateway."""
    stages = _stages()
    for target in ("gateway", "inferer"):
        stage = stages[target]
        assert stage.base not in stages  # it would inherit all that is in there
        assert not re.search(r"build-essential|gcc|cmake|ninja", " ".join(stage.all("RUN")))
    assert "build-essential" in " ".join(stages["inferer-build"].all("RUN"))

    gateway = stages["gateway"]
    assert _copied_stages(gateway) == {"gateway-build"}
    assert not any("inferer" in arguments for arguments in gateway.all("COPY"))
    sources = [s for s in _copied_sources(gateway) if s != "services/__init__.py"]
    assert sorted(sources) == ["services/gateway", "shared"]
    sources = [s for s in _copied_sources(stages["inferer"]) if s != "services/__init__.py"]
    assert sorted(sources) == ["services/inferer", "shared"]


def test_files_that_images_copy_exist() -> None:
    """Every source exists and is not held back by ``.dockerignore``, which names what may pass."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    passing = {line[1:] for line in ignored if line.startswith("!")}
    stages = _stages()
    sources = {source for stage in stages.values() for source in _copied_sources(stage)}
    assert {"pyproject.toml", "constraints.txt", "shared"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(Path(source).is_relative_to(path) for path in passing), source
    for stage in stages.values():
        assert _copied_stages(stage) <= set(stages)


def test_each_image_installs_its_extra(tmp_path: Path) -> None:
    """The very script of the stage ``requirements`` writes what `pyproject.toml` asks for."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (script,) = _stages()["requirements"].all("RUN")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", script], cwd=tmp_path, env={"PATH": path}, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("gateway", "inferer"):
        written = (tmp_path / f"{extra}.txt").read_text().splitlines()
        assert written == project["dependencies"] + project["optional-dependencies"][extra]
        stage = _stages()[f"{extra}-build"]
        assert f"--from=requirements /requirements/{extra}.txt ." in stage.all("COPY")
        assert "PIP_CONSTRAINT=/build/constraints.txt" in stage.all("RUN")[-1]
        assert f"-r {extra}.txt" in stage.all("RUN")[-1]
    assert "llama" not in (tmp_path / "gateway.txt").read_text()


def test_no_file_names_an_index() -> None:
    """Where packages and images come from is for those to say who build: no address but loopback's
    and no option that names one."""
    for file in (CONTAINERFILE, COMPOSE, ROOT / "constraints.txt", NATS_CONFIGURATION):
        text = file.read_text()
        for address in re.findall(r"https?://([^/:\s\"']+)", text):
            assert address == "127.0.0.1", file
        assert not re.search(r"index-url|find-links|trusted-host|PIP_INDEX", text), file


# services/inferer/health.py


async def test_an_inferer_is_healthy_while_its_entry_lives(
    broker: Broker, nats_server: NatsServer
) -> None:
    """1 before there is a bucket, before there is an entry and after it is gone; 0 in between. Each
    failure says why in one line."""
    environment = {"NATS_URL": nats_server.url, "INFERER_ID": "here", "INFERER_ALIAS": "tiny"}
    status, printed = _health(environment)
    assert (status, printed.count("\n")) == (1, 1)
    assert "INFERERS" in printed

    await ensure_topology(broker, Topology(), [])
    missing = (1, "inferer health: here is not among the live inferers\n")
    assert _health(environment) == missing
    async with presence(broker, lambda: _entry("here"), asyncio.Event()):
        assert _health(environment) == (0, "")
        assert _health({**environment, "INFERER_ID": "elsewhere"})[0] == 1
    assert _health(environment) == missing


async def test_an_inferer_without_an_id_is_found(stack: Stack, tiny_model: Path) -> None:
    """The check names the inferer as it names itself: from host and model, as in a container."""
    environment = {"INFERER_ID": "", "INFERER_ALIAS": "checked"}
    inferer = stack.start_inferer(tiny_model, **environment)
    stack.wait_until_served("checked")
    environment |= {"NATS_URL": stack.nats.url, "INFERER_MODEL": str(tiny_model)}
    assert _health(environment) == (0, "")
    assert inferer.terminate() == 0
    assert _health(environment)[0] == 1


def test_the_health_check_waits_for_no_broker(nats_server: NatsServer) -> None:
    """Without a broker, and with a wrong setting, it ends soon and says so; a check that is killed
    for its slowness says nothing."""
    nats_server.process.end()
    status, printed = _health({"NATS_URL": nats_server.url}, patience_s=10)
    assert (status, printed) == (1, "inferer health: no connection to the broker in 3 s\n")
    status, printed = _health({"INFERER_MODLE": "smollm2"}, patience_s=10)
    assert (status, printed.count("\n")) == (1, 1)
    assert "INFERER_MODLE" in printed


def test_the_health_check_loads_no_model() -> None:
    """It runs beside the inferer every half minute: without llama.cpp, whose import is slow."""
    code = "import services.inferer.health, sys; sys.exit('llama_cpp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _health(environment: dict[str, str], patience_s: float = 60) -> tuple[int, str]:
    """Exit status and output of the check."""
    done = subprocess.run(
        [sys.executable, "-m", "services.inferer.health"],
        cwd=ROOT,
        env={**clean_environment(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience_s,
    )
    return done.returncode, done.stdout


def _entry(inferer_id: str) -> InfererEntry:
    return InfererEntry(
        id=inferer_id,
        model="tiny",
        slots=1,
        host="here",
        threads=1,
        n_ctx=512,
        tasks=["chat", "complete"],
        started_at=timestamp(),
        version="0",
        token_bytes=12,
    )


# Reading the files


def _raw_compose() -> Configuration:
    """Without the real parser, for tests that run what is written there."""
    found: Configuration = yaml.safe_load(COMPOSE.read_text())
    return found


def _without_compose_settings() -> dict[str, str]:
    """`clean_environment` without COMPOSE_FILE, COMPOSE_PROFILES and their like."""
    environment = clean_environment()
    return {name: environment[name] for name in environment if not name.startswith("COMPOSE_")}


def _seconds(duration: str) -> float:
    """``1m30s``, as both generations of docker-compose write it."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)([hms])", duration))


def _ports(service: Configuration) -> list[tuple[str, int, int]]:
    """``(address, published, in the container)``; the two generations write them otherwise."""
    found = []
    for port in service.get("ports", []):
        if isinstance(port, str):
            host, published, target = port.partition("/")[0].rsplit(":", 2)
        else:
            host, published, target = port["host_ip"], port["published"], port["target"]
        found.append((host, int(published), int(target)))
    return found


def _mounts(service: Configuration) -> dict[str, tuple[str, bool]]:
    """For each path in the container its source, and whether it is read-only."""
    found = {}
    for mount in service.get("volumes", []):
        if isinstance(mount, str):
            source, target, *mode = mount.split(":")
            found[target] = (source, "ro" in "".join(mode).split(","))
        else:
            found[mount["target"]] = (mount["source"], mount.get("read_only", False))
    return found


def _with_port(text: str, port: int, ours: int | None) -> str:
    return text.replace(f"127.0.0.1:{port}/", f"127.0.0.1:{ours}/")


def _instructions() -> list[tuple[str, str]]:
    lines = [ln for ln in CONTAINERFILE.read_text().splitlines() if not ln.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", "").splitlines()
    parts = (line.partition(" ") for line in whole if line.strip())
    return [(instruction.upper(), arguments.strip()) for instruction, _, arguments in parts]


def _stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for instruction, arguments in _instructions():
        if instruction == "FROM":
            base, as_, name = arguments.split()
            assert as_ == "AS"
            stages[name] = stage = Stage(base, name)
        elif stages:
            stage.instructions.append((instruction, arguments))
    return stages


def _build_arguments() -> list[str]:
    return [arguments.partition("=")[0] for name, arguments in _instructions() if name == "ARG"]


def _copied_sources(stage: Stage) -> list[str]:
    """What comes from the checkout."""
    copies = (arguments.split() for arguments in stage.all("COPY") if "--from" not in arguments)
    return [source for *sources, _ in copies for source in sources]


def _copied_stages(stage: Stage) -> set[str]:
    return set(re.findall(r"--from=(\S+)", " ".join(stage.all("COPY"))))
