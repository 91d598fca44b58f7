"""What strikes. A fault is a function with `@fault`: it says whom it has hit when it hits, and
returns when what it struck serves again."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from shared import subjects
from tests.chaos.parts import Inferer, Node, Part
from tests.chaos.site import Site

TOLD_WITHIN_S = 60.0


@dataclass
class Strike:
    """One fault as it struck; times are those of the wall clock, which the broker's are too."""

    kind: str
    random: Random
    began: float
    """When the run began."""
    at: float | None = None
    ended: float | None = None
    target: str = ""
    job_id: str | None = None
    """The job that its target was in the middle of."""
    of_broker: bool = False
    """Announcements may be lost meanwhile; nothing else may."""

    def __str__(self) -> str:
        if self.at is None or self.ended is None:
            return f"{self.kind} struck nothing"
        return (
            f"{self.at - self.began:6.1f} s  {self.kind:<16} {self.target:<10} "
            f"{self.ended - self.at:5.1f} s"
        )

    def hits(self, part: Part, job_id: str | None = None) -> None:
        self.at, self.target, self.job_id = time.time(), part.name, job_id
        self.of_broker = isinstance(part, Node)


Fault = Callable[[Site, Strike], Awaitable[None]]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


@fault
async def freeze_inferer(site: Site, strike: Strike) -> None:
    """SIGSTOP in the middle of a job, for longer than its lease: the late result must lose."""
    async with site.busy_inferer(strike.random) as (inferer, job_id):
        inferer.freeze()
        strike.hits(inferer, job_id)
        try:
            await asyncio.sleep(site.topology.ack_wait_s + strike.random.uniform(1, 4))
        finally:
            inferer.thaw()
        if job_id is not None:
            await _until_told(inferer, job_id)


@fault
async def kill_inferer(site: Site, strike: Strike) -> None:
    """kill -9 in the middle of a job."""
    async with site.busy_inferer(strike.random) as (inferer, job_id):
        inferer.kill()
        strike.hits(inferer, job_id)
        await _start_again(inferer, strike.random)


@fault
async def restart_inferer(site: Site, strike: Strike) -> None:
    """SIGTERM in the middle of a job, as in a rolling restart: it ends or hands back its job."""
    async with site.busy_inferer(strike.random) as (inferer, job_id):
        strike.hits(inferer, job_id)
        await _terminate(inferer)
        await _start_again(inferer, strike.random)


@fault
async def kill_gateway(site: Site, strike: Strike) -> None:
    """kill -9 while clients wait: they go to the other one."""
    async with site.one_of(site.gateways, strike.random) as gateway:
        gateway.kill()
        strike.hits(gateway)
        await _start_again(gateway, strike.random)


@fault
async def restart_gateway(site: Site, strike: Strike) -> None:
    """SIGTERM while clients wait."""
    async with site.one_of(site.gateways, strike.random) as gateway:
        strike.hits(gateway)
        await _terminate(gateway)
        await _start_again(gateway, strike.random)


@fault
async def kill_node(site: Site, strike: Strike) -> None:
    """kill -9 of any NATS node, started again on the same data."""
    async with site.cluster.minority:
        await _kill_node(strike.random.choice(site.cluster.nodes), strike)


@fault
async def kill_leader(site: Site, strike: Strike) -> None:
    """The same of the node that leads one of the streams."""
    async with site.cluster.minority:
        stream = strike.random.choice((subjects.REQUESTS, subjects.RESULTS, subjects.EVENTS))
        await _kill_node(await site.cluster.leader(stream), strike)


@fault
async def freeze_node(site: Site, strike: Strike) -> None:
    """SIGSTOP of any NATS node for some seconds, so that others may take over its lead."""
    async with site.cluster.minority:
        node = strike.random.choice(site.cluster.nodes)
        node.freeze()
        strike.hits(node)
        try:
            await asyncio.sleep(strike.random.uniform(2, 12))
        finally:
            node.thaw()
        await node.until_ready()


async def _kill_node(node: Node, strike: Strike) -> None:
    node.kill()
    strike.hits(node)
    await _start_again(node, strike.random)


async def _terminate(part: Part) -> None:
    status = await part.terminate()
    if status != 0:
        raise RuntimeError(f"{part.name} ended with exit status {status} after SIGTERM")


async def _until_told(inferer: Inferer, job_id: str) -> None:
    """Until it says that it is done with the job, whoever was first."""
    async with asyncio.timeout(TOLD_WITHIN_S):
        while all(event["job_id"] != job_id for event in inferer.events("job_finished")):
            await asyncio.sleep(0.1)


async def _start_again(part: Part, random: Random) -> None:
    await asyncio.sleep(random.uniform(0.2, 3))
    part.launch()
    await part.until_ready()
