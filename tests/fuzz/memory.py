"""Whether memory stays flat."""

import resource
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.chaos.parts import Node, Part

SPARE_BYTES = 40 * 1024**2
"""What a process may gain in any case: the largest bodies leave holes in the heap."""
BYTES_PER_CASE = 512
"""What it may gain for each case besides: what leaks a few kB a request shows within an hour."""
BROKER_BYTES_PER_CASE = 8_192
"""The broker keeps an index of what it stores: every job, with its events and its result."""
BROKER_SPARE_BYTES = 256 * 1024**2
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class Sample:
    case: int
    """How many cases had been sent."""
    resident_bytes: int


@dataclass(frozen=True)
class Growth:
    """How one process grew after its warm-up."""

    name: str
    before_bytes: float
    after_bytes: float
    cases: int
    allowed_bytes: float

    @property
    def is_flat(self) -> bool:
        return self.after_bytes - self.before_bytes <= self.allowed_bytes

    def __str__(self) -> str:
        before, after, allowed = (
            round(size / 1024**2)
            for size in (self.before_bytes, self.after_bytes, self.allowed_bytes)
        )
        return (
            f"{self.name}: {before} MiB after its warm-up, {after} MiB at the end, {self.cases} "
            f"cases later ({allowed} MiB more are allowed)"
        )


class Memory:
    """The resident memory of every process since its last start."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)
        self._brokers: set[str] = set()

    def sample(self, parts: list[Part], case: int) -> None:
        for part in parts:
            process = part.process
            if process is None:
                continue
            try:
                resident = _resident_bytes(process.pid)
            except (OSError, IndexError):
                continue  # it has died
            if isinstance(part, Node):
                self._brokers.add(part.name)
            self.add(part.name, process.pid, Sample(case, resident))

    def add(self, name: str, pid: int, sample: Sample) -> None:
        self._samples[name, pid].append(sample)

    def growths(self) -> list[Growth]:
        """Of each process that was there long enough: the second fifth against the last one."""
        found = []
        for (name, _), samples in self._samples.items():
            if len(samples) < LEAST_SAMPLES:
                continue
            fifth = len(samples) // 5
            before, after = samples[fifth : 2 * fifth], samples[-fifth:]
            cases = after[len(after) // 2].case - before[len(before) // 2].case
            is_broker = name in self._brokers
            spare = BROKER_SPARE_BYTES if is_broker else SPARE_BYTES
            each = BROKER_BYTES_PER_CASE if is_broker else BYTES_PER_CASE
            found.append(
                Growth(
                    name,
                    median(one.resident_bytes for one in before),
                    median(one.resident_bytes for one in after),
                    cases,
                    spare + each * cases,
                )
            )
        return found


def _resident_bytes(pid: int) -> int:
    """Of a process and its children: an inferer computes in one. Raises: OSError, IndexError."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * resource.getpagesize() + sum(_resident_bytes(int(child)) for child in children)
