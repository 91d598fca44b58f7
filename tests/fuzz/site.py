"""What is fuzzed: a broker, two gateways, two inferers with two slots each, as processes that are
started again when they die."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.chaos.parts import Gateway, Inferer, Node, Part
from tests.fuzz.findings import Findings
from tests.fuzz.running import RunningJobs

SLOTS = 2
N_CTX = 1_024
"""So that a job of which nobody says how long it may be ends soon."""
STALL_S = 60
"""Longer than any pause of a machine that many share."""
TAIL = 1_500


@dataclass(frozen=True)
class Death:
    name: str
    status: int
    jobs: frozenset[str]
    """Those that an inferer was running."""
    tail: str
    """The last lines of its log."""


class Site:
    """Starts with the block, and ends with it."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        findings: Findings,
        inferer: Sequence[str] = ("services.inferer",),
        gateway: Sequence[str] = ("services.gateway",),
    ) -> None:
        """``inferer`` and ``gateway`` are the modules they run, with their arguments."""
        self.folder = folder
        self.node = Node("nats", folder, {"nats": 0})
        url = self.node.url
        # With a short list of jobs: one that still grows would look like a leak.
        self.gateways = [
            Gateway(
                *(f"gateway-{n}", folder, url, 1),
                module=tuple(gateway),
                GATEWAY_HISTORY_JOBS="1000",
            )
            for n in range(2)
        ]
        self.inferers = [
            Inferer(
                f"inferer-{n}",
                folder,
                url,
                model,
                tuple(inferer),
                INFERER_CONCURRENCY=str(SLOTS),
                INFERER_STALL_S=str(STALL_S),
                INFERER_N_CTX=str(N_CTX),
            )
            for n in range(2)
        ]
        self.deaths: list[Death] = []
        self.pids = folder / "pids.json"
        """The process of each gateway by its URL, for the probe."""
        self._findings = findings
        self._running = RunningJobs(self.node.port)
        self._ending = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="watch")

    @property
    def parts(self) -> list[Part]:
        return [self.node, *self.gateways, *self.inferers]

    def __enter__(self) -> Self:
        try:
            self.node.launch()
            asyncio.run(self.node.until_ready())
            self._running.start()
            for part in self.parts[1:]:
                part.launch()
            asyncio.run(self._until_served())
        except BaseException:
            self._end()
            raise
        self._write_pids()
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._watching.join()
        self._end()

    def _note_deaths(self) -> None:
        """Note whatever has died, and start it again."""
        for part in self.parts:
            process = part.process
            if process is None or (status := process.popen.poll()) is None:
                continue
            jobs = self._running.lost_by(part.name)
            self.deaths.append(Death(part.name, status, jobs, part.tail(TAIL)))
            if part not in self.inferers:  # an inferer may die if a job is then to blame
                self._findings.add(
                    f"{part.name.partition('-')[0]} died",
                    f"{part.name}, exit status {status}:\n{part.tail(TAIL)}",
                )
            part.launch()
            self._write_pids()

    def _watch(self) -> None:
        while not self._ending.wait(0.1):
            self._note_deaths()

    async def _until_served(self) -> None:
        await asyncio.gather(*(part.until_ready() for part in self.parts))
        deadline = time.monotonic() + 60
        for gateway in self.gateways:
            while await gateway.known_inferers() < len(self.inferers):
                assert time.monotonic() < deadline, "the gateways do not know the inferers"
                await asyncio.sleep(0.1)

    def _write_pids(self) -> None:
        pids = {g.url: g.process.pid for g in self.gateways if g.process is not None}
        written = self.pids.with_suffix(".new")
        written.write_text(json.dumps(pids))
        written.rename(self.pids)

    def _end(self) -> None:
        self._running.stop()
        for part in reversed(self.parts):
            part.kill()
