"""One fault as it struck."""

import time
from dataclasses import dataclass
from random import Random

from tests.chaos.parts import Node, Part


@dataclass
class Strike:
    """Times are those of the wall clock, which the broker's are too."""

    kind: str
    random: Random
    began: float
    """When the run began."""
    is_brief: bool
    """In the short form nothing is to take longer than it must."""
    at: float | None = None
    ended: float | None = None
    target: str = ""
    job_id: str | None = None
    """The job that its target was in the middle of."""
    of_broker: bool = False
    """Announcements may be lost meanwhile; nothing else may."""

    def __str__(self) -> str:
        if self.at is None or self.ended is None:
            return f"{self.kind} struck nothing"
        return (
            f"{self.at - self.began:6.1f} s  {self.kind:<16} {self.target:<10} "
            f"{self.ended - self.at:5.1f} s"
        )

    def hits(self, part: Part, job_id: str | None = None) -> None:
        self.at, self.target, self.job_id = time.time(), part.name, job_id
        self.of_broker = isinstance(part, Node)
