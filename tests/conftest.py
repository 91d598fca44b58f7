"""Real parts for every test: a broker, models, processes."""

import os
import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from services.inferer.engine.model import Model
from shared.broker.connection import Broker
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.model_files import locate
from tests.support.processes import Child, NatsServer, Stack, scripts
from tests.support.tiny_model import write_tiny_model
from tests.support.up import Up

MOST_LOGS_SHOWN = 12
LOG_LINES_SHOWN = 25

# The same cases in every run, and no limit for one: machines differ, and what is slow is measured
# elsewhere. `make fuzz` searches for new ones.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What inferers keep for their next start is of this run, and goes with it."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF that loads and runs in milliseconds, with a chat template; alias ``tiny``."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template; alias ``tiny-base``."""
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_model(folder / "tiny-base.gguf", chat=False)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Model]:
    """The tiny model, loaded in the test's own process."""
    loaded = Model(tiny_model, 0)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled model, which really answers."""
    return locate("smollm2")


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A broker of its own for one test, with the configuration that users run."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def broker(nats_server: NatsServer) -> AsyncIterator[Broker]:
    """A connection to `nats_server`."""
    connection = Broker(BrokerSettings(url=nats_server.url), "test")
    await connection.connect()
    yield connection
    await connection.close()


@pytest.fixture
async def queue(broker: Broker) -> Broker:
    """A broker with our streams, and a consumer for the model `tiny` that delivers one job."""
    await ensure_topology(broker, Topology(), ["tiny"])
    return broker


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path) -> Iterator[Stack]:
    """NATS, a gateway and one inferer with the tiny model, as processes, ready to serve."""
    with Stack(tmp_path) as running:
        running.serve(tiny_model)
        yield running


@pytest.fixture(scope="module")
def shared_stack(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stack]:
    """A `stack` for all tests of a module that leave it as they found it."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.serve(tiny_model)
        yield running


@pytest.fixture
def ups() -> Iterator[list[Up]]:
    """Whatever is put in is ended with the test."""
    running: list[Up] = []
    yield running
    for up in running:
        up.end()


@pytest.fixture(scope="session")
def nats_command() -> str:
    """The ``nats`` command line."""
    path = os.pathsep.join((str(scripts()), os.environ["PATH"], str(Path.home() / "go" / "bin")))
    found = shutil.which("nats", path=path)
    if found is None:
        pytest.skip("needs the nats command: go install github.com/nats-io/natscli/nats@latest")
    return found


def pytest_runtest_setup(item: pytest.Item) -> None:
    Child.started[:] = [child for child in Child.started if child.popen.poll() is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the last lines of all processes: their files may be gone when it is read."""
    report = yield
    if report.failed:
        for child in Child.started[-MOST_LOGS_SHOWN:]:
            with suppress(OSError):
                last = "\n".join(child.output().splitlines()[-LOG_LINES_SHOWN:])
                report.sections.append((f"the end of {child.log.name}", last))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where everything can be run (`.ci/run` says so), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("SLUICE_NO_SKIPS") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
