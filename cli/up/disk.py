"""The disk under the broker of `sluice up`: how much may be stored, and what once it was full."""

import asyncio
import shutil
from pathlib import Path

import httpx

from cli.up.child import Child
from shared.errors import StorageShort
from shared.logs import logger

MOST_STORED_BYTES = 10 * 1024**3
ROOM_BYTES = 16 * 1024**2
"""Two of the largest messages: with less a broker that is started again is soon where it was."""

LOOK_EVERY_S = 2.0
PAUSE_S = 10.0
"""After a restart: what keeps a broker from writing may be something else than a full disk."""

log = logger()


def storage_limit(folder: Path) -> int:
    """What ``folder`` holds already and half of what its disk has free, in bytes; 10 GB at most."""
    own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return min(MOST_STORED_BYTES, own + shutil.disk_usage(folder).free // 2)


class DiskWatch:
    """Restarts ``broker`` when it has given up writing and ``folder``, its own, has room again.

    After a failed write nats-server never tries again, whatever becomes of the disk.
    """

    def __init__(self, url: str, broker: Child, patience_s: float, folder: Path) -> None:
        """``url`` is the gateway's; ``patience_s`` is what the broker gets to stop."""
        self._http = httpx.AsyncClient(base_url=url, timeout=LOOK_EVERY_S, trust_env=False)
        self._broker = broker
        self._patience_s = patience_s
        self._folder = folder

    async def run(self) -> None:
        """Look until cancelled."""
        told = False
        async with self._http:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                if not await self._is_unwritable():
                    told = False
                    continue
                free_bytes = shutil.disk_usage(self._folder).free
                if free_bytes >= ROOM_BYTES:
                    log.warning("broker_restarting", why="it could not write, and there is room")
                    await self._broker.restart(self._patience_s)
                    await asyncio.sleep(PAUSE_S)
                elif not told:
                    told = True
                    log.error(
                        "disk_full",
                        folder=str(self._folder),
                        free_bytes=free_bytes,
                        hint=f"free {ROOM_BYTES} bytes or more; the broker is then restarted",
                    )

    async def _is_unwritable(self) -> bool:
        """Whether that is why the gateway is not ready."""
        try:
            answer = await self._http.get("/readyz")
            return answer.status_code == 503 and answer.json()["code"] == StorageShort.code
        except (httpx.HTTPError, ValueError, KeyError):
            return False
