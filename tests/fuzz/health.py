"""The probe's measurements, as they come."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tests.fuzz.probe import LIMIT_S
from tests.support.processes import Process


class Health:
    """The probe runs for as long as the block."""

    def __init__(self, pids: Path, folder: Path) -> None:
        self.answers = 0
        self.worst_s = 0.0
        """The slowest answer."""
        self.worst_own_s = 0.0
        """The same without what the machine made everybody wait."""
        self._pids = pids
        self._log = folder / "probe.log"
        self._read = 0

    def __enter__(self) -> Self:
        self._probe = Process(
            [sys.executable, "-m", "tests.fuzz.probe", str(self._pids)], self._log
        )
        self._probe.wait_for("probe_ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._probe.terminate()

    def faults(self) -> Iterator[str]:
        """New answers that took a gateway more than a second of its own, or were no answers."""
        assert self._probe.popen.poll() is None, self._probe.output()
        for measured in self._new():
            self.answers += 1
            self.worst_s = max(self.worst_s, measured["took_s"])
            self.worst_own_s = max(self.worst_own_s, measured["own_s"])
            if measured["own_s"] > LIMIT_S or measured["status"] not in (0, 200):
                yield json.dumps(measured)

    def _new(self) -> Iterator[dict[str, Any]]:
        with self._log.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + (1 if whole else 0)
        for line in whole.splitlines():
            found = json.loads(line)
            if found["event"] == "probed":
                yield found
