"""What a gateway holds on to, as it shows from outside."""

import asyncio
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import httpx2

from shared.broker.connection import Broker
from shared.wire import subjects
from tests.chaos.parts import Gateway, Node
from tests.support.processes import eventually

POOL_THREADS = 8
"""A pool starts its threads when they are first needed, and keeps them."""

COUNTS = ("consumers", "connections", "subscriptions", "descriptors", "threads", "tasks")


@dataclass(frozen=True)
class Footprint:
    """Everything but ``resident_bytes`` is to be as it was once the clients have gone."""

    consumers: int
    """On the streams that clients read."""
    connections: int
    """Of the broker."""
    subscriptions: int
    """Of those connections."""
    descriptors: int
    """Files and sockets that the gateway has open."""
    threads: int
    tasks: int
    """Of its event loop."""
    resident_bytes: int

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {getattr(self, name)}" for name in COUNTS)
        return f"{counts}, {self.resident_bytes / 1024**2:.1f} MiB"

    def excess(self, before: "Footprint") -> dict[str, int]:
        """What there is more of than before."""
        more = {name: getattr(self, name) - getattr(before, name) for name in COUNTS}
        if more["threads"] <= POOL_THREADS:
            more["threads"] = 0
        return {name: count for name, count in more.items() if count > 0}


async def footprint(node: Node, gateway: Gateway, broker: Broker, counted: Path) -> Footprint:
    """``counted`` is where the gateway writes how many tasks it has."""
    assert gateway.process is not None
    consumers = 0
    for stream in (subjects.EVENTS, subjects.RESULTS, subjects.REQUESTS):
        consumers += (await broker.js.stream_info(stream)).state.consumer_count
    async with httpx2.AsyncClient(base_url=node.monitoring) as http:
        open_now = (await http.get("/connz?limit=10000")).json()["connections"]
    process = Path(f"/proc/{gateway.process.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Footprint(
        consumers=consumers,
        connections=len(open_now),
        subscriptions=sum(connection["subscriptions"] for connection in open_now),
        descriptors=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
        tasks=await asyncio.to_thread(_count_tasks, gateway.process.pid, counted),
        resident_bytes=pages * resource.getpagesize(),
    )


def _count_tasks(pid: int, counted: Path) -> int:
    counted.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    eventually(counted.exists, "the gateway has counted its tasks")
    return int(counted.read_text())
