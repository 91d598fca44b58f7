"""The broker's time. All processes use it, since the clocks of hosts may be wrong and may jump."""

import time
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec import Struct
from nats.aio.client import Client

ASK = "$SYS.REQ.USER.INFO"
"""Answered by the server that this connection is with, for every user, with its time."""


class _Server(Struct, frozen=True):
    time: datetime


class _Reply(Struct, frozen=True):
    server: _Server


_decode = msgspec.json.Decoder(_Reply).decode


class BrokerClock:
    """Advances between two readings, also while this machine sleeps."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._time: datetime | None = None
        self._error_s = 0.0

    @property
    def is_known(self) -> bool:
        return self._time is not None

    def now(self) -> datetime:
        """The broker's time, in UTC; this host's until the broker's has been read once."""
        if self._time is None:
            return datetime.now(UTC)
        return self._time + timedelta(seconds=_boot_time_s() - self._read_at)

    async def read(self, client: Client, timeout_s: float) -> None:
        """Ask the broker for its time.

        Raises:
            nats.errors.Error: no answer.
            ValueError: the answer contains no valid time.
        """
        asked_at = _boot_time_s()
        answer = await client.request(ASK, b"", timeout_s)
        read_at = _boot_time_s()
        # The broker read it at some moment between the request and the answer.
        error_s = (read_at - asked_at) / 2
        said = _decode(answer.data).server.time + timedelta(seconds=error_s)
        # A slow reading does not replace a quick one, unless the two contradict each other.
        if self._time is not None and error_s > self._error_s:
            expected = self._time + timedelta(seconds=read_at - self._read_at)
            if abs((said - expected).total_seconds()) <= error_s:
                return
        self._time, self._read_at, self._error_s = said.astimezone(UTC), read_at, error_s


def _boot_time_s() -> float:
    """As `time.monotonic`, but it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
