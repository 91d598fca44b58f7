"""The processes that tests talk to: started on free loopback ports, always ended."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, ClassVar, Self, TypeVar

import httpx2

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = ROOT / "deploy/nats/nats.conf"
"""The broker's, as users run it."""
STORE = "10GB"
"""How much a broker may store, unless a test says otherwise; its configuration requires it."""
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
PATIENCE_S = 60.0
"""Generous: the machines that run this are shared. Nothing here measures speed."""

LOWEST_PORT = 10_000
_given: set[int] = set()

T = TypeVar("T")


def scripts() -> Path:
    """Where this environment's console scripts are."""
    return Path(sysconfig.get_path("scripts"))


def end_on_sigterm() -> None:
    """Have SIGTERM end a program as Ctrl-C does, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_port() -> int:
    """A free port that nobody else takes while its process is not there, or not yet: no outgoing
    connection, no other caller of this function, no other worker of pytest."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = LOWEST_PORT + (worker - LOWEST_PORT) % workers
    random = SystemRandom()
    while True:
        port = random.randrange(first, first_ephemeral_port(), workers)
        if port in _given:
            continue
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _given.add(port)
            return port


def first_ephemeral_port() -> int:
    """Linux takes ports for outgoing connections from here on."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def eventually(read: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first value of ``read`` that is neither None nor False; polls, and fails in the end."""
    give_up_at = time.monotonic() + patience_s
    while True:
        value = read()
        if value is not None and value is not False:
            return value
        assert time.monotonic() < give_up_at, f"not within {patience_s} s: {what}"
        time.sleep(0.02)


def cpu_ticks(pid: int) -> int:
    """What a process has used, outside the kernel."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


class Child:
    """A process whose log is a file."""

    started: ClassVar[list["Child"]] = []
    """For the report of a test that fails: those that it started, or that ran when it began."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self.log = log
        Child.started.append(self)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Process(Child):
    """A child with its whole output in its log, ended with the block."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        cpus: Iterable[int] | None = None,
        output_end: int | None = None,
    ):
        """``cpus`` are the numbers of those it may run on; None means all. It writes to
        ``output_end``, a descriptor, in place of ``log``, if there is one."""
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**clean_environment(), "SLUICE_STORE": STORE, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output if output_end is None else output_end,
                stderr=subprocess.STDOUT,
                preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
            )
        super().__init__(popen, log)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def family(self) -> list[int]:
        """The ids of the process and of those that descend from it, each after its parent."""
        found = [self.pid]
        for pid in found:
            with suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                found += [int(child) for child in children]
        return found

    def freeze(self) -> None:
        """SIGSTOP, for its descendants too: an inferer computes in a child. Returns when all their
        threads have stopped."""
        self._signal(signal.SIGSTOP)
        for pid in self.family():
            eventually(partial(_is_stopped, pid), f"{pid} has stopped")

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.family():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of this event."""
        found = []
        for line in self.output().splitlines():
            if line.startswith("{") and f'"event": "{name}"' in line:
                found.append(json.loads(line))
        return found

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The ``count``-th log line of this event."""

        def logged() -> dict[str, Any] | None:
            found = self.events(event)
            if len(found) >= count:
                return found[count - 1]
            assert self.popen.poll() is None, f"exited before {event}:\n{self.output()}"
            return None

        return eventually(logged, f"{event} in\n{self.output()}")

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        return self.popen.wait(PATIENCE_S)

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait(PATIENCE_S)

    def end(self) -> None:
        """Whatever state it is in; tests of how it stops use `terminate`."""
        if MEASURED and self.popen.poll() is None:
            # What coverage has found is written when a process ends, and SIGKILL does not let it.
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        if self.popen.poll() is None:
            self.kill()


def _is_stopped(pid: int) -> bool:
    """Also where it has ended."""
    try:
        statuses = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread has ended meanwhile
        return False
    # The state follows the name, which may contain anything.
    return all(status.rpartition(")")[2].split()[0] in "TtZX" for status in statuses)


class NatsServer:
    """A real broker on a free port; it can be killed and started again on the same data."""

    def __init__(
        self, folder: Path, configuration: Path = CONFIGURATION, store: str = STORE
    ) -> None:
        """``store`` is how much it may hold, ``20MB`` for example."""
        self._folder = folder
        self._configuration = configuration
        self.store = store
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()

    def start(self) -> None:
        self.process = Process(
            [
                str(scripts() / "nats-server"),
                *("-c", str(self._configuration)),
                *("-a", "127.0.0.1", "-p", str(self.port), "-sd", str(self._folder)),
            ],
            self._folder / "log",
            {"SLUICE_STORE": self.store},
        )
        eventually(self._answers, "nats-server listens")

    def wipe(self) -> None:
        """Lose everything that was stored; while it is down."""
        shutil.rmtree(self._folder / "jetstream")

    def _answers(self) -> bool:
        assert self.process.popen.poll() is None, self.process.output()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                return connection.recv(4) == b"INFO"
        except OSError:
            return False


class Stack:
    """NATS at once; gateways and inferers as a test starts them."""

    def __init__(
        self, folder: Path, configuration: Path = CONFIGURATION, store: str = STORE
    ) -> None:
        """``configuration`` is the broker's, ``store`` how much it may hold."""
        self.folder = folder
        self.nats = NatsServer(folder / "nats", configuration, store)
        self.gateways: list[Process] = []
        self.inferers: list[Process] = []
        self.urls: list[str] = []
        self._clients: list[httpx2.Client] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        for process in (*self.gateways, *self.inferers):
            process.end()
        self.nats.process.end()

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def http(self) -> httpx2.Client:
        """A client of the first gateway."""
        if not self._clients:
            self._clients.append(httpx2.Client(base_url=self.url, timeout=PATIENCE_S))
        return self._clients[0]

    def start_gateway(self, **environment: str) -> Process:
        port = environment.pop("GATEWAY_PORT", str(free_port()))
        gateway = self._start("gateway", len(self.gateways), GATEWAY_PORT=port, **environment)
        self.gateways.append(gateway)
        self.urls.append(f"http://127.0.0.1:{port}")
        return gateway

    def end_gateway(self) -> None:
        """End the gateway that was started last, so that it serves no other test."""
        self.gateways.pop().end()
        self.urls.pop()

    def start_inferer(
        self, model: Path, cpus: Iterable[int] | None = None, /, **environment: str
    ) -> Process:
        number = len(self.inferers)
        inferer = self._start(
            "inferer",
            number,
            cpus,
            INFERER_MODEL=str(model),
            **{"INFERER_ID": f"inferer-{number}", "INFERER_THREADS": "1", **environment},
        )
        self.inferers.append(inferer)
        return inferer

    def serve(self, model: Path) -> None:
        """A gateway and an inferer with this model, under the name of its file, ready."""
        self.start_gateway()
        self.start_inferer(model)
        self.wait_until_served(model.stem)

    def wait_until_served(self, model: str, inferers: int = 1) -> None:
        """Until the gateway is ready and so many inferers of ``model`` are live."""

        def is_served() -> bool:
            for process in (*self.gateways, *self.inferers):
                assert process.popen.poll() is None, process.output()
            try:
                answer = self.http.get("/queue")
            except httpx2.TransportError:
                return False
            queues = answer.json().get("models", []) if answer.status_code == 200 else []
            return any(q["model"] == model and q["inferers"] >= inferers for q in queues)

        eventually(is_served, f"{model} is served")

    def submit(self, **body: Any) -> str:
        """The id of a new job."""
        answer = self.http.post("/jobs", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/status/{job_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_for_state(self, job_id: str, *states: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.status(job_id)
            return found if found["state"] in states else None

        return eventually(reached, f"{job_id} is {' or '.join(states)}")

    def wait_for_end(self, job_id: str) -> dict[str, Any]:
        return self.wait_for_state(job_id, "SUCCESS", "FAILURE", "REVOKED")

    def _start(
        self, service: str, number: int, cpus: Iterable[int] | None = None, /, **environment: str
    ) -> Process:
        return Process(
            [sys.executable, "-m", f"services.{service}"],
            self.folder / f"{service}-{number}.log",
            {"NATS_URL": self.nats.url, **environment},
            cpus,
        )


def clean_environment() -> dict[str, str]:
    """Ours, without settings that would change what is tested."""
    prefixes = ("GATEWAY_", "INFERER_", "NATS_", "SLUICE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def printed_by(command: list[str]) -> str:
    """What a command prints that succeeds."""
    return subprocess.run(
        command,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    ).stdout


def server_sent_events(response: httpx2.Response) -> Iterator[dict[str, str]]:
    """The events of a stream, as dictionaries of their fields."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line == "":
            if fields:
                yield fields
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
