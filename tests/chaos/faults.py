"""What strikes. A fault is a function with `@fault`: it says whom it has hit when it hits, and
returns when what it struck serves again."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from shared import subjects
from tests.chaos.errands import Errand
from tests.chaos.parts import Inferer, Node, Part
from tests.chaos.site import Site
from tests.chaos.strike import Strike
from tests.shim import POISON

TOLD_WITHIN_S = 60.0
GIVEN_UP_WITHIN_S = 300.0
"""A job that hangs is started three times, and each start costs a lease."""


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
async def starve_inferer(site: Site, strike: Strike) -> None:
    """No more memory for some seconds in the middle of a job, of which it may die."""
    async with site.busy_inferer(strike.random) as (inferer, job_id):
        with inferer.excused():
            with inferer.without_memory():
                strike.hits(inferer, job_id)
                await asyncio.sleep(strike.random.uniform(1, 4))
            await inferer.until_ready()


@fault
async def hang_compute(site: Site, strike: Strike) -> None:
    """A job in which the compute thread hangs each time it is started. The watchdog ends that
    process; the job is given up in the end, by its deadline or with its third inferer."""
    body: dict[str, object] = {
        "prompt": f"please {POISON} this",
        "max_tokens": 3,
        "priority": "high",
    }
    if strike.is_brief or strike.random.random() < 0.5:
        body["timeout_s"] = 20
    client = site.clients.client(Errand(-1, "polls", 0, body, strike.random))
    with site.all_excused(site.inferers):
        async with asyncio.timeout(GIVEN_UP_WITHIN_S):
            ended = asyncio.create_task(client.polls())
            while strike.at is None and not ended.done():
                await asyncio.sleep(0.005)
                name = client.job_id and site.listener.inferer_of(client.job_id)
                for inferer in site.inferers:
                    if inferer.name == name:
                        strike.hits(inferer, client.job_id)
            await ended


@fault
async def corrupt_model(site: Site, strike: Strike) -> None:
    """Started again it finds half of its model's file, until somebody puts the whole one back."""
    async with site.one_of(site.inferers, strike.random) as inferer:
        with inferer.excused():
            with inferer.model_cut_off():
                inferer.kill()
                strike.hits(inferer)
                inferer.launch()
                log = inferer.logs[-1]
                async with asyncio.timeout(TOLD_WITHIN_S):
                    while "cannot load the model" not in log.read_text(errors="replace"):
                        await asyncio.sleep(0.1)
            await inferer.until_ready()


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
async def rolling_restart(site: Site, strike: Strike) -> None:
    """SIGTERM of everything, one process at a time, the next once this one serves again."""
    strike.hits(site.cluster.nodes[0])
    strike.target = "everything"
    for node in site.cluster.nodes:
        async with site.cluster.minority:
            await _terminate(node)
            node.launch()
            await node.until_ready()
    for part in site.services:
        async with part.lock:
            await _terminate(part)
            part.launch()
            await part.until_ready()


@fault
async def restart_node(site: Site, strike: Strike) -> None:
    """SIGTERM of any NATS node."""
    async with site.cluster.minority:
        node = strike.random.choice(site.cluster.nodes)
        strike.hits(node)
        await _terminate(node)
        await _start_again(node, strike.random)


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
            await asyncio.sleep(strike.random.uniform(2, 12 if strike.is_brief else 32))
        finally:
            node.thaw()
        await node.until_ready()


@fault
async def fill_disk(site: Site, strike: Strike) -> None:
    """No byte left for any NATS node, until somebody makes room and starts it again."""
    async with site.cluster.minority:
        node = strike.random.choice(site.cluster.nodes)
        if node.disk is None:
            return  # only root may mount one
        await asyncio.to_thread(node.disk.fill)
        strike.hits(node)
        try:
            await asyncio.sleep(strike.random.uniform(2, 6))
        finally:
            node.disk.relieve()
        node.kill()
        node.launch()
        await node.until_ready()


async def _kill_node(node: Node, strike: Strike) -> None:
    node.kill()
    strike.hits(node)
    await _start_again(node, strike.random)


async def _terminate(part: Part) -> None:
    status = await part.terminate()
    if status != 0 and not part.may_die:  # one whose compute thread hangs is ended by its watchdog
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
