"""Everything that must hold all the while, checked once a second."""

import threading
from typing import Self

from tests.fuzz.findings import Findings
from tests.fuzz.health import Health
from tests.fuzz.logs import Logs
from tests.fuzz.memory import Memory
from tests.fuzz.site import Site
from tests.fuzz.target import Target

EVERY_S = 1.0


class Watch:
    """Checks until the end of the block, on a thread of its own."""

    def __init__(self, site: Site, target: Target, health: Health, findings: Findings) -> None:
        self.memory = Memory()
        self._logs = Logs()
        self._site = site
        self._target = target
        self._health = health
        self._findings = findings
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._look()
        for growth in self.memory.growths():
            if not growth.is_flat:
                self._findings.add(f"memory of {growth.name} grows", str(growth))

    def _run(self) -> None:
        while not self._ending.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        self.memory.sample(self._site.parts, self._target.cases)
        for kind, line in self._logs.faults(self._site.parts):
            self._findings.add(kind, line)
        for measured in self._health.faults():
            self._findings.add("a health probe was not answered within a second", measured)
