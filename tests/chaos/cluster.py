"""Three NATS servers on loopback that hold every stream together, or one alone."""

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from shared.broker.connection import Broker
from shared.config import BrokerSettings
from tests.chaos.parts import Node
from tests.chaos.store import stream_info
from tests.support.disk import CannotMount, mounted
from tests.support.processes import free_port

DISK_BYTES = 512 * 1024**2


class Cluster:
    """Runs for as long as the block. ``broker`` is a connection to whichever node is there."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        routes = {f"node-{number}": free_port() for number in range(nodes)}
        self.nodes = [Node(name, folder, routes) for name in routes]
        self.url = ",".join(node.url for node in self.nodes)
        self.broker = Broker(BrokerSettings(url=self.url), "chaos")
        self._disks = ExitStack()
        self.minority = asyncio.Lock()
        """Held while a node is down or catches up: the others are needed for a majority."""

    async def __aenter__(self) -> Self:
        try:
            for node in self.nodes:
                with suppress(CannotMount):
                    node.disk = self._disks.enter_context(mounted(node.data, DISK_BYTES))
                node.launch()
            await asyncio.gather(*(node.until_ready() for node in self.nodes))
            await self.broker.connect()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.broker.close()
        for node in self.nodes:
            node.kill()
        self._disks.close()

    async def leader(self, stream: str) -> Node:
        """The node that leads ``stream``."""
        info = await stream_info(self.broker, stream)
        leader = info.cluster.leader if info.cluster else None
        return next((node for node in self.nodes if node.name == leader), self.nodes[0])
