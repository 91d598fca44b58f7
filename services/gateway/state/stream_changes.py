"""Whether streams may have been deleted or changed since they were last checked."""

import time
from collections.abc import Collection

from nats.aio.msg import Msg

from shared.broker.connection import Broker
from shared.wire import subjects

CHECK_EVERY_S = 30.0
"""An advisory may be lost."""


class StreamChanges:
    """The broker announces them, and whatever it announces is checked at the gateway's next turn,
    as is everything after a reconnect."""

    def __init__(self, broker: Broker, names: Collection[str]) -> None:
        """``names`` are those of the streams that matter."""
        self._broker = broker
        self._names = names
        self._check_at = 0.0
        broker.on_reconnect(self.check_again)

    async def watch(self) -> None:
        await self._broker.nc.subscribe(subjects.STREAM_ADVISORIES, cb=self._on_advisory)

    @property
    def is_check_due(self) -> bool:
        return time.monotonic() >= self._check_at

    def checking(self) -> None:
        """A check begins: what changes from now on will be in the next one."""
        self._check_at = time.monotonic() + CHECK_EVERY_S

    def check_again(self) -> None:
        """At the next turn."""
        self._check_at = 0.0

    async def _on_advisory(self, message: Msg) -> None:
        if message.subject.rpartition(".")[2] in self._names:
            self.check_again()
