"""Everything that runs: NATS nodes, two gateways, two inferers, listeners, and clients."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Self, TypeVar

from shared.broker.streams import Topology
from tests.chaos.clients import Clients
from tests.chaos.cluster import Cluster
from tests.chaos.ledger import Ledger
from tests.chaos.listener import Listener
from tests.chaos.parts import Gateway, Inferer, Part
from tests.support.shim import DYING_AND_HANGING, write_shim

SLOTS = 2
BUSY_WITHIN_S = 10.0
LIVE_WITHIN_S = 30.0
LONG_JOB_TOKENS = 600
"""A job of so many tokens is still running when a fault that waited for it strikes."""

WITHOUT_MEMORY = ("MemoryError", "ImportError", "RuntimeError: can't start new thread")

P = TypeVar("P", bound=Part)


class Site:
    """Starts with the block, and ends with it, whatever state it is in."""

    def __init__(
        self, folder: Path, model: Path, nodes: int, inferer: tuple[str, ...], ledger: Ledger
    ) -> None:
        """``inferer`` is the module that inferers run, with its arguments."""
        self.cluster = Cluster(folder, nodes)
        self.topology = Topology(replicas=nodes)
        url = self.cluster.url
        self.gateways = [Gateway(f"gateway-{n}", folder, url, nodes) for n in range(2)]
        settings = {
            "INFERER_CONCURRENCY": str(SLOTS),
            "LLAMA_CPP_LIB_PATH": str(write_shim(folder / "llama", DYING_AND_HANGING)),
        }
        self.inferers = [
            Inferer(f"inferer-{n}", folder, url, model, inferer, **settings) for n in range(2)
        ]
        self.clients = Clients([gateway.url for gateway in self.gateways], self.cluster.url, ledger)
        self.listener = Listener()
        self.deaths: list[str] = []
        """Processes that ended although no fault had to do with it."""
        self._stack = AsyncExitStack()

    @property
    def services(self) -> list[Part]:
        return [*self.gateways, *self.inferers]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.cluster)
            for part in self.services:
                stack.callback(part.kill)
            stack.push_async_callback(self.listener.close)
            await stack.enter_async_context(self.clients)
            await self.listener.connect([node.url for node in self.cluster.nodes])
            for part in self.services:
                part.launch()
            await asyncio.gather(*(part.until_ready() for part in self.services))
            async with asyncio.timeout(LIVE_WITHIN_S):
                for gateway in self.gateways:
                    while await gateway.known_inferers() < len(self.inferers):
                        await asyncio.sleep(0.05)
            watching = asyncio.create_task(self._watch())
            stack.callback(watching.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def one_of(self, parts: Sequence[P], random: Random) -> AsyncIterator[P]:
        """A part that no other fault has, for as long as the block takes."""
        free = [part for part in parts if not part.lock.locked()]
        part = random.choice(free or list(parts))
        async with part.lock:
            yield part

    @contextmanager
    def all_excused(self, parts: Sequence[Part]) -> Iterator[None]:
        """See `Part.excused`."""
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.excused())
            yield

    @asynccontextmanager
    async def busy_inferer(self, random: Random) -> AsyncIterator[tuple[Inferer, str | None]]:
        """As `one_of`, an inferer in the middle of a job, and that job; None if there is no long
        one in time."""
        deadline = time.monotonic() + BUSY_WITHIN_S
        while time.monotonic() < deadline:
            for inferer in random.sample(self.inferers, len(self.inferers)):
                since = inferer.launched
                job_id = self.listener.is_running(inferer.name, LONG_JOB_TOKENS, since)
                if job_id is not None and not inferer.lock.locked():
                    async with inferer.lock:
                        yield inferer, job_id
                    return
            await asyncio.sleep(0.005)
        async with self.one_of(self.inferers, random) as inferer:
            yield inferer, None

    def tracebacks(self) -> list[str]:
        """Logs in which a service did not expect what happened. One that had no memory may say
        that it ends of that; where it could not even be imported, or a thread had no room for its
        stack, Python says so."""
        starved = set().union(*(inferer.starved for inferer in self.inferers))
        return [
            f"a traceback in {log}"
            for part in self.services
            for log in part.logs
            if "Traceback" in (text := log.read_text("utf-8"))
            and not (log in starved and any(error in text for error in WITHOUT_MEMORY))
        ]

    async def _watch(self) -> None:
        """Start again what dies by itself, as a supervisor does."""
        while True:
            await asyncio.sleep(0.1)
            for part in (*self.cluster.nodes, *self.services):
                if part.has_died and part.process is not None:
                    if not part.may_die:
                        status = part.process.popen.returncode
                        self.deaths.append(f"{part.name} ended by itself, exit status {status}")
                    part.launch()
