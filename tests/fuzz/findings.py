"""What was found: printed when it is found, kept in a file, each kind once."""

import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

RECENT = 30
LONGEST_INPUT = 400
"""Characters of a case that is one of many."""


@dataclass(frozen=True)
class Finding:
    kind: str
    """A few words that are the same when the same thing is found again."""
    text: str
    input: str
    """The smallest case that shows it; or the last ones before it, where no single case does."""


class Findings:
    """Whatever was found by anything that watches; a thread may add to it at any time."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.all: list[Finding] = []
        self.recent: deque[str] = deque(maxlen=RECENT)
        """The last cases that were sent, for what no single case explains."""
        self._seed = seed
        self._folder = folder
        self._lock = threading.Lock()

    def sent(self, case: str) -> None:
        self.recent.append(case[:LONGEST_INPUT])

    def add(self, kind: str, text: str, case: str | None = None) -> None:
        """``case`` is the smallest input; None where the last ones have to do."""
        with self._lock:
            if any(found.kind == kind for found in self.all):
                return
            shown = "the last cases, the latest last:\n" + "\n".join(self.recent)
            self.all.append(Finding(kind, text, shown if case is None else case))
            printed = self.report(self.all[-1])
            print(printed, flush=True)
            with (self._folder / "findings.txt").open("a") as file:
                file.write(printed + "\n")

    def report(self, found: Finding) -> str:
        return (
            f"FOUND {found.kind}: {found.text}\n"
            f"  seed {self._seed}, logs in {self._folder}\n  {found.input}\n"
        )
