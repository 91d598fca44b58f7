"""One process of the site under chaos: struck in every way, and started again as it was."""

import asyncio
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos.log_pipe import LogPipe
from tests.support.disk import Disk
from tests.support.processes import ROOT, Process, free_port, scripts

READY_WITHIN_S = 60.0
STALL_S = 5.0


class Part:
    """A NATS node, a gateway or an inferer. Each start writes a log of its own."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        folder: Path,
        is_ready: Callable[["Part"], Awaitable[bool]],
    ) -> None:
        self.name = name
        self.lock = asyncio.Lock()
        """Held by the fault that strikes it, until it serves again."""
        self.logs: list[Path] = []
        self.launched = 0.0
        """When it was started last, by `time.monotonic`."""
        self.process: Process | None = None
        self._excuses = 0
        self._command = command
        self._environment = environment
        self._folder = folder
        self._is_ready = is_ready

    @property
    def has_died(self) -> bool:
        """Whether it ended although nobody struck it."""
        return self.process is not None and self.process.popen.poll() is not None

    @property
    def may_die(self) -> bool:
        """Whether a fault is at work that ends it now and then."""
        return self._excuses > 0

    @contextmanager
    def excused(self) -> Iterator[None]:
        """During the block it may end by itself; the site starts it again."""
        self._excuses += 1
        try:
            yield
        finally:
            self._excuses -= 1

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of this event, of all its starts."""
        lines = [line for log in self.logs for line in log.read_text(errors="replace").splitlines()]
        return [
            json.loads(line)
            for line in lines
            if line.startswith("{") and line.endswith("}") and f'"event": "{name}"' in line
        ]

    def tail(self, size: int) -> str:
        """The last ``size`` characters of its log."""
        return self.logs[-1].read_text(errors="replace")[-size:]

    def launch(self) -> None:
        self.process = Process(self._command, self._new_log(), self._environment)

    def launch_with_pipe(self) -> LogPipe:
        """As `launch`, with a pipe to its log that can be blocked."""
        log = self._new_log()
        pipe = LogPipe(log)
        self.process = Process(self._command, log, self._environment, output_end=pipe.end)
        pipe.close_end()
        return pipe

    def _new_log(self) -> Path:
        self.launched = time.monotonic()
        self.logs.append(self._folder / f"{self.name}.{len(self.logs) + 1}.log")
        return self.logs[-1]

    async def until_ready(self) -> None:
        """Raises: TimeoutError: it does not serve within a minute; RuntimeError: it has died."""
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                while not await self._is_ready(self):
                    if self.has_died and not self.may_die:
                        raise RuntimeError(
                            f"{self.name} died before it was ready: {self.tail(1000)}"
                        )
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise TimeoutError(f"{self.name} was not ready within {READY_WITHIN_S} s") from None

    def kill(self) -> None:
        """kill -9, in whatever state it is."""
        process, self.process = self.process, None
        if process is not None:
            process.end()

    async def terminate(self) -> int:
        """SIGTERM; the exit status."""
        process, self.process = self.process, None
        assert process is not None
        try:
            return await asyncio.to_thread(process.terminate)
        finally:
            process.end()

    def freeze(self) -> None:
        if self.process is not None and self.process.popen.poll() is None:
            self.process.freeze()

    def thaw(self) -> None:
        if self.process is not None and self.process.popen.poll() is None:
            self.process.thaw()


class Node(Part):
    """One nats-server, alone or in a cluster, with the settings that users run."""

    def __init__(self, name: str, folder: Path, routes: dict[str, int]) -> None:
        """``routes`` are the cluster ports of all nodes by their names."""
        self.port, monitoring = free_port(), free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        lines = [
            (ROOT / "deploy/nats/nats.conf").read_text(),
            f"server_name: {name}",
            f'http: "127.0.0.1:{monitoring}"',
        ]
        if len(routes) > 1:
            lines += [
                "cluster {",
                "  name: chaos",
                f'  listen: "127.0.0.1:{routes[name]}"',
                # A subscriber at one node is to get what that node publishes, and no other.
                "  no_advertise: true",
                "  routes: [",
                *(f'    "nats://127.0.0.1:{routes[other]}"' for other in routes if other != name),
                "  ]",
                "}",
            ]
        self.monitoring = f"http://127.0.0.1:{monitoring}"
        self.data = folder / name
        self.data.mkdir()
        self.disk: Disk | None = None
        """That of its own, where it has one."""
        self.configuration = folder / f"{name}.conf"
        self.configuration.write_text("\n".join(lines) + "\n")
        super().__init__(
            name,
            [
                str(scripts() / "nats-server"),
                *("-c", str(self.configuration)),
                *("-a", "127.0.0.1", "-p", str(self.port), "-sd", str(self.data)),
            ],
            {},
            folder,
            # It says so once every stream and consumer that it holds has caught up.
            _answers(f"{self.monitoring}/healthz"),
        )

    @contextmanager
    def misconfigured(self, edit: Callable[[str], str]) -> Iterator[None]:
        """During the block it runs with what ``edit`` makes of its configuration, loaded without a
        restart."""
        right = self.configuration.read_text()
        self._load(edit(right))
        try:
            yield
        finally:
            self._load(right)

    def _load(self, configuration: str) -> None:
        self.configuration.write_text(configuration)
        if self.process is not None and not self.has_died:
            os.kill(self.process.pid, signal.SIGHUP)


class Gateway(Part):
    def __init__(
        self,
        name: str,
        folder: Path,
        nats_url: str,
        replicas: int,
        *,
        module: tuple[str, ...] = ("services.gateway",),
        **environment: str,
    ) -> None:
        """``module`` is what python runs, with its arguments."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(
            name,
            [sys.executable, "-m", *module],
            {
                "NATS_URL": nats_url,
                "GATEWAY_PORT": str(self.port),
                "GATEWAY_REPLICAS": str(replicas),
                **environment,
            },
            folder,
            _answers(f"{self.url}/readyz"),
        )

    async def known_inferers(self) -> int:
        """How many inferers it knows for its models."""
        try:
            async with httpx2.AsyncClient(base_url=self.url, timeout=20) as http:
                answer = await http.get("/queue")
        except httpx2.TransportError:
            return 0  # another fault has struck it
        return sum(queue["inferers"] for queue in answer.json().get("models", []))


class Inferer(Part):
    """With a copy of the model that is its own."""

    def __init__(
        self,
        name: str,
        folder: Path,
        nats_url: str,
        model: Path,
        module: tuple[str, ...] = ("services.inferer",),
        /,
        **environment: str,
    ) -> None:
        """``module`` is what python runs, with its arguments."""
        (folder / name).mkdir()
        self.model = Path(shutil.copy(model, folder / name))
        self.starved: set[Path] = set()
        """Logs of the processes that were without memory for a while."""
        super().__init__(
            name,
            [sys.executable, "-m", *module],
            {
                "NATS_URL": nats_url,
                "INFERER_MODEL": str(self.model),
                "INFERER_ID": name,
                "INFERER_THREADS": "1",
                "INFERER_GRACE_S": "0.5",  # some jobs end within it, some are handed back
                "INFERER_STALL_S": str(STALL_S),
                **environment,
            },
            folder,
            _says_it_is_ready,
        )

    @property
    def is_dying(self) -> bool:
        """Whether what computes, its child, is dead, or not born yet."""
        return self.process is not None and len(self.process.family()) == 1

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """During the block it gets no more than it has; ends with nobody to give it to, too."""
        assert self.process is not None
        self.starved.add(self.logs[-1])
        pid = self.process.family()[:2][-1]  # what computes is its child
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        _, most = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), most))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_AS, (most, most))

    @contextmanager
    def model_cut_off(self) -> Iterator[None]:
        """During the block the second half of its GGUF is missing, but for a process that
        has loaded it."""
        whole, half = self.model.with_suffix(".whole"), self.model.with_suffix(".half")
        data = self.model.read_bytes()
        half.write_bytes(data[: len(data) // 2])
        self.model.rename(whole)
        half.rename(self.model)
        try:
            yield
        finally:
            whole.rename(self.model)


def _answers(url: str) -> Callable[[Part], Awaitable[bool]]:
    async def answers(_: Part) -> bool:
        try:
            async with httpx2.AsyncClient(timeout=2) as http:
                return (await http.get(url)).status_code == 200
        except httpx2.TransportError:
            return False

    return answers


async def _says_it_is_ready(part: Part) -> bool:
    return part.process is not None and bool(part.process.events("inferer_ready"))
