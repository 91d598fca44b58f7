"""What a gateway holds on to, as it shows from outside."""

import resource
from dataclasses import dataclass
from pathlib import Path

import httpx

from shared import subjects
from shared.broker import Broker
from tests.chaos.parts import Gateway, Node


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
    resident_bytes: int

    def excess(self, before: "Footprint") -> dict[str, int]:
        """What there is more of than before."""
        names = ("consumers", "connections", "subscriptions", "descriptors", "threads")
        more = {name: getattr(self, name) - getattr(before, name) for name in names}
        return {name: count for name, count in more.items() if count > 0}


async def footprint(node: Node, gateway: Gateway, broker: Broker) -> Footprint:
    assert gateway.process is not None
    consumers = 0
    for stream in (subjects.EVENTS, subjects.RESULTS, subjects.REQUESTS):
        consumers += (await broker.js.stream_info(stream)).state.consumer_count
    async with httpx.AsyncClient(base_url=node.monitoring) as http:
        open_now = (await http.get("/connz?limit=10000")).json()["connections"]
    process = Path(f"/proc/{gateway.process.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return Footprint(
        consumers=consumers,
        connections=len(open_now),
        subscriptions=sum(connection["subscriptions"] for connection in open_now),
        descriptors=len(list((process / "fd").iterdir())),
        threads=len(list((process / "task").iterdir())),
        resident_bytes=pages * resource.getpagesize(),
    )
