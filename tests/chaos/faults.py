"""What strikes. A fault is a function with `@fault`: it says whom it has hit when it hits, and
returns when what it struck serves again."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

from shared.job_ids import new_job_id
from shared.wire import subjects
from tests.chaos.errands import POISONED, Errand
from tests.chaos.parts import STALL_S, Inferer, Node, Part
from tests.chaos.site import Site
from tests.chaos.strike import Strike
from tests.fuzz.inputs.messages import BROKEN, HEADER_BLOCKS, REPLIES
from tests.support.raw_nats import Closed, RawNats, publication
from tests.support.shim import HANG, POISON

TOLD_WITHIN_S = 60.0
HANGS_S = 3 * STALL_S
"""How long an inferer hangs at most: its watchdog looks only every few seconds."""
SERVED_WITHIN_S = 30.0
MENDED_AFTER_S = 1.0
GIVEN_UP_WITHIN_S = 300.0
"""A job that hangs is started three times, and each start costs a lease."""

MISTAKES: dict[str, Callable[[str], str]] = {
    "nobody may publish": lambda right: right.replace(
        "nkey: $anybody", "nkey: $anybody, permissions: { publish: nothing }"
    ),
    "one connection": lambda right: f"{right}\nmax_connections: 1\n",
    "short lines": lambda right: f"{right}\nmax_control_line: 32\n",
    "no configuration": lambda right: f"{right}\nmax_payload: [\n",
}
"""In a broker's configuration. All but the last, which it refuses, close connections."""

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
    """SIGTERM in the middle of a job, as in a rolling restart: it completes or requeues its job."""
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
        "prompt": f"please {HANG} this",
        "max_tokens": 3,
        "priority": "high",
    }
    if strike.is_brief or strike.random.random() < 0.5:
        # It is to run before that, also where the site has much to mend: after the end of a lease.
        body["timeout_s"] = 90
    await _run_deadly(site, strike, Errand(-1, "polls", 0, body, strike.random))


@fault
async def poison(site: Site, strike: Strike) -> None:
    """A job that kills every inferer that computes it, by a real signal: it ends by name, and the
    jobs beside it complete."""
    body: dict[str, object] = {"prompt": f"a {POISON} b", "max_tokens": 3, "priority": "high"}
    await _run_deadly(site, strike, Errand(-2, POISONED, 0, body, strike.random))


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
                    while "is damaged" not in log.read_text(errors="replace"):
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
async def reload_wrongly(site: Site, strike: Strike) -> None:
    """A node loads a configuration with a mistake, which is mended a second later. A service that
    its node throws out comes back, or ends to be started again."""
    async with site.cluster.minority:
        node = strike.random.choice(site.cluster.nodes)
        mistake = strike.random.choice(sorted(MISTAKES))
        with site.all_excused(site.services):
            strike.hits(node)
            with node.misconfigured(MISTAKES[mistake]):
                await asyncio.sleep(MENDED_AFTER_S)
            await node.until_ready()
            await _until_all_serve(site)


@fault
async def send_rubbish(site: Site, strike: Strike) -> None:
    """A foreign connection sends invalid messages to every subject that is read: no process dies,
    and none stops receiving for long."""
    node = strike.random.choice(site.cluster.nodes)
    strike.hits(node)
    await asyncio.to_thread(_send_rubbish, node, strike.random)


@fault
async def block_log(site: Site, strike: Strike) -> None:
    """Nobody reads what a service writes, for some seconds: it serves all the same."""
    async with site.one_of(site.services, strike.random) as part:
        await _terminate(part)
        pipe = part.launch_with_pipe()
        await part.until_ready()
        pipe.block()
        strike.hits(part)
        try:
            await asyncio.sleep(strike.random.uniform(2, 6))
        finally:
            pipe.unblock()


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


async def _run_deadly(site: Site, strike: Strike, errand: Errand) -> None:
    """Have a job end of which inferers die."""
    client = site.clients.client(errand)
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
            # The job may still hang somewhere: its deadline has passed meanwhile, or a change of
            # leader had it delivered twice.
            await asyncio.sleep(HANGS_S)
            # One whose child has died first reports that, which a broker in trouble delays.
            while any(inferer.is_dying or inferer.has_died for inferer in site.inferers):
                await asyncio.sleep(0.1)


def _send_rubbish(node: Node, random: Random) -> None:
    job_id = new_job_id()
    read = (
        *("infer.queue", "infer.chat", "infer.cancel.tiny.x", f"infer.finished.tiny.{job_id}"),
        *(
            f"infer.events.tiny.{job_id}.state",
            f"infer.events.tiny.{job_id}.tokens",
            "infer.dead.tiny.x",
        ),
        *(
            f"$KV.{subjects.INFERERS}.x",
            f"$KV.{subjects.IDEMPOTENCY}.x",
            "infer.control.tiny.inferer-0",
            "infer.handover.tiny.inferer-0",
        ),
    )
    bodies = (b"", b"X", b"\xff", b"[" * 5_000, b'{"state":"\xff"}', b'{"at":"soon"}', b"{}")
    for _ in range(20):
        subject = random.choice(read)
        # The broker answers what it stores, wherever that goes.
        reply = random.choice(REPLIES) if subject.startswith("infer.") else b""
        sent = publication(
            subject.encode(),
            random.choice(bodies),
            b"" if ".events." in subject or ".dead." in subject else reply,
            random.choice((None, *HEADER_BLOCKS)),
        )
        with suppress(Closed, OSError), RawNats(node.port) as connection:
            connection.send(random.choice((sent, sent, random.choice(BROKEN))))
            connection.settle()


async def _until_all_serve(site: Site) -> None:
    """Every gateway is ready and knows every inferer; or so long that others have struck them."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SERVED_WITHIN_S):
            for gateway in site.gateways:
                await gateway.until_ready()
                while await gateway.known_inferers() < len(site.inferers):
                    await asyncio.sleep(0.1)


async def _kill_node(node: Node, strike: Strike) -> None:
    node.kill()
    strike.hits(node)
    await _start_again(node, strike.random)


async def _terminate(part: Part) -> None:
    may_die = part.may_die  # the fault that makes it die may be over before it has ended
    status = await part.terminate()
    may_die |= part.may_die
    if status != 0 and not may_die:  # one whose compute thread hangs is ended by its watchdog
        raise RuntimeError(f"{part.name} ended with exit status {status} after SIGTERM")


async def _until_told(inferer: Inferer, job_id: str) -> None:
    """Until it says that it is done with the job, whoever was first; or has died of another one."""
    log = inferer.logs[-1]
    async with asyncio.timeout(TOLD_WITHIN_S):
        while all(event["job_id"] != job_id for event in inferer.events("job_finished")):
            if inferer.logs[-1] != log:
                return
            await asyncio.sleep(0.1)


async def _start_again(part: Part, random: Random) -> None:
    await asyncio.sleep(random.uniform(0.2, 3))
    part.launch()
    await part.until_ready()
