"""The peers as processes: their servers, their workers, and clients that execute commands; the
versions of everything, and how much CPU time and memory a process takes."""

import ctypes
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx2

from benchmarks.peers.comparison import Machine
from services.inferer.engine.library import compiled_for, library_folder, load_backends
from shared.cpus import cpu_model, usable_cpus
from tests.support.processes import (
    ROOT,
    Process,
    clean_environment,
    eventually,
    free_port,
    scripts,
)

PEERS = ROOT / ".venv/peers"
PYTHON = PEERS / "bin/python"
LLAMA_SERVER = PEERS / "llama-server/build/bin/llama-server"
WHERE_FROM = {
    "redis-server": "install it: apt-get install redis-server",
    str(PYTHON): "make bench-peers makes it",
    str(LLAMA_SERVER): "make bench-peers compiles it",
}
N_CTX = 4096
"""Tokens of context for each job."""
END_S = 10.0
"""How long a process gets to end."""


def require(*programs: str | Path) -> None:
    """End this process, with one line, if one of these is missing."""
    for program in map(str, programs):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing; {WHERE_FROM[program]}")


@contextmanager
def running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """A process that ends with the block, and all that it has started."""
    process = Process(command, log, environment)
    try:
        yield process
    finally:
        family = process.family()
        process.popen.terminate()
        process.thaw()
        with suppress(subprocess.TimeoutExpired):
            process.popen.wait(END_S)
        for pid in family[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.end()


@contextmanager
def redis(folder: Path) -> Iterator[tuple[Process, str]]:
    """A Redis with its default settings, and its URL."""
    port = free_port()
    folder.mkdir()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with running(command, folder / "log") as server:
        eventually(lambda: "Ready to accept connections" in server.output(), "Redis listens")
        yield server, f"redis://127.0.0.1:{port}"


def celery_worker(concurrency: int) -> list[str]:
    """The command."""
    return [
        *(str(PYTHON), "-m", "celery", "--app", "benchmarks.peers.celery_tasks", "worker"),
        *("--pool", "prefork", "--concurrency", str(concurrency), "--prefetch-multiplier", "1"),
        *("--without-gossip", "--without-mingle"),
    ]


@contextmanager
def celery(
    folder: Path, redis_url: str, concurrency: int, model: Path | None = None
) -> Iterator[Process]:
    """A worker of the Celery application, which may not be ready yet. With ``model``, its processes
    share out the CPUs."""
    environment = {"PEERS_REDIS": redis_url}
    if model is not None:
        threads = max(1, usable_cpus() // concurrency)
        environment |= {
            "PEERS_MODEL": str(model),
            "PEERS_THREADS": str(threads),
            "PEERS_N_CTX": str(N_CTX),
        }
    log = folder / f"celery-{concurrency}.log"
    with running(celery_worker(concurrency), log, environment) as worker:
        yield worker


def taskiq_worker(concurrency: int) -> list[str]:
    """The command."""
    return [
        *(str(PEERS / "bin/taskiq"), "worker", "benchmarks.peers.taskiq_tasks:broker"),
        *("--workers", "1", "--max-async-tasks", str(concurrency), "--ack-type", "when_saved"),
        *("--log-level", "WARNING"),
    ]


@contextmanager
def taskiq(folder: Path, nats_url: str, concurrency: int) -> Iterator[Process]:
    """A worker of the taskiq application, which may not be ready yet."""
    log = folder / f"taskiq-{concurrency}.log"
    with running(taskiq_worker(concurrency), log, {"NATS_URL": nats_url}) as worker:
        yield worker


def llama_server(model: Path, slots: int) -> list[str]:
    """The command of llama.cpp's server, without its port. Prompts are cached by default."""
    threads = str(usable_cpus())
    return [
        *(str(LLAMA_SERVER), "--model", str(model), "--alias", "smollm2"),
        *("--ctx-size", str(N_CTX * slots), "--parallel", str(slots)),
        *("--threads", threads, "--threads-batch", threads),
    ]


def llama_cpp_python_server(model: Path) -> list[str]:
    """The command of llama-cpp-python's server, without its port. It runs one request at a time,
    which by default the next one interrupts, and keeps the beginning of the last prompt."""
    threads = str(usable_cpus())
    return [
        *(str(PYTHON), "-m", "llama_cpp.server", "--model", str(model), "--model_alias", "smollm2"),
        *("--n_ctx", str(N_CTX), "--n_threads", threads, "--n_threads_batch", threads),
        *("--interrupt_requests", "false", "--logits_all", "false", "--flash_attn", "true"),
    ]


@contextmanager
def http_server(command: list[str], log: Path) -> Iterator[str]:
    """The URL of a server with OpenAI's API."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running([*command, "--host", "127.0.0.1", "--port", str(port)], log) as server:

        def answers() -> bool:
            assert server.popen.poll() is None, server.output()
            with suppress(httpx2.TransportError):
                return httpx2.get(f"{url}/v1/models", trust_env=False).status_code == 200
            return False

        eventually(answers, f"{command[0]} serves")
        yield url


class Client:
    """A peer's client, which reads commands from its stdin."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        self._module = module
        self._popen = subprocess.Popen(
            [str(PYTHON), "-m", f"benchmarks.peers.{module}"],
            cwd=ROOT,
            env={**clean_environment(), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.communicate("")

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ask(self, command: str, **arguments: Any) -> Any:
        """What the command measured."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._popen.stdin.flush()
        answer = self._popen.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._module} ended; the reason is above")
        return json.loads(answer)


def cpu_s(*pids: int) -> float:
    """CPU seconds that these processes have taken since they started."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(*pids: int) -> float:
    """Of these processes together, what is in memory now."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> Machine:
    load_backends()
    return Machine(
        cpu=cpu_model(),
        usable_cpus=usable_cpus(),
        features=compiled_for(),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        kernel=platform.release(),
        python=platform.python_version(),
        load=os.getloadavg()[0],
    )


def has_amx() -> bool:
    """Whether llama.cpp was compiled for AMX on this CPU, which changes all ratios."""
    load_backends()
    return "AMX_INT8" in compiled_for()


def versions(*names: str) -> dict[str, str]:
    """Of Sluice, of llama.cpp on both sides, and of these packages and programs."""
    installed = {
        distribution.name.lower(): distribution.version
        for path in ([str(next(PEERS.glob("lib/python*/site-packages")))], sys.path)
        for distribution in importlib.metadata.distributions(path=path)
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    found = {"Sluice": f"{installed['sluice']} ({commit.stdout.strip() or 'no git'})"}
    for name in names:
        if name in PROGRAMS:
            found[name] = _first_line(PROGRAMS[name])
        elif name == "llama.cpp":
            found["llama.cpp of Sluice"] = _ggml(library_folder())
            if LLAMA_SERVER.exists():
                found["llama.cpp's server"] = _ggml(LLAMA_SERVER.parent)
        else:
            found[name] = installed[name]
    return found


PROGRAMS = {
    "redis-server": ["redis-server", "--version"],
    "nats-server": [str(scripts() / "nats-server"), "--version"],
}


def _first_line(command: list[str]) -> str:
    return subprocess.check_output(command, text=True).splitlines()[0]


def _ggml(folder: Path) -> str:
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_version.restype = ctypes.c_char_p
    return f"GGML {library.ggml_version().decode()}"
