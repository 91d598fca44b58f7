"""The disk of the broker of `sluice up`: its storage limit, and recovery after it was full."""

import asyncio
import shutil
from pathlib import Path

import httpx2

from cli.up.child import Child
from shared.errors import StorageShort
from shared.logs import logger

MAX_STORED_BYTES = 10 * 1024**3
MIN_FREE_BYTES = 16 * 1024**2
"""Two of the largest messages; with less free space a restart would not help for long."""

POLL_S = 2.0
PAUSE_S = 10.0
"""After a restart, since the broker may be unable to write for another reason."""

log = logger()


def storage_limit(folder: Path) -> int:
    """The size of ``folder`` plus half of the free space on its disk, in bytes; 10 GB at most."""
    own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return min(MAX_STORED_BYTES, own + shutil.disk_usage(folder).free // 2)


class DiskWatch:
    """Restarts ``broker`` when it cannot write any more and its ``folder`` has free space again.

    After a failed write nats-server does not write again until it is restarted.
    """

    def __init__(self, url: str, broker: Child, stop_timeout_s: float, folder: Path) -> None:
        """``url`` is the gateway's; ``stop_timeout_s`` is how long the broker may take to stop."""
        self._http = httpx2.AsyncClient(base_url=url, timeout=POLL_S, trust_env=False)
        self._broker = broker
        self._stop_timeout_s = stop_timeout_s
        self._folder = folder

    async def run(self) -> None:
        """Poll until cancelled."""
        is_reported = False
        async with self._http:
            while True:
                await asyncio.sleep(POLL_S)
                if not await self._is_unwritable():
                    is_reported = False
                    continue
                free_bytes = shutil.disk_usage(self._folder).free
                if free_bytes >= MIN_FREE_BYTES:
                    log.warning(
                        "broker_restarting", why="it could not write, and the disk has space again"
                    )
                    await self._broker.restart(self._stop_timeout_s)
                    await asyncio.sleep(PAUSE_S)
                elif not is_reported:
                    is_reported = True
                    log.error(
                        "disk_full",
                        folder=str(self._folder),
                        free_bytes=free_bytes,
                        hint=f"free at least {MIN_FREE_BYTES} bytes; the broker is then restarted",
                    )

    async def _is_unwritable(self) -> bool:
        """Whether the gateway is not ready for this reason."""
        try:
            answer = await self._http.get("/readyz")
            return answer.status_code == 503 and answer.json()["code"] == StorageShort.code
        except (httpx2.HTTPError, ValueError, KeyError):
            return False
