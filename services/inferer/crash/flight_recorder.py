"""What the inferer is doing, in memory that outlives it: its parent process reads it when it dies.

The memory is an anonymous file that both processes map. What was written can be read, however the
writer dies a moment later.
"""

import json
import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER_BYTES = 2048
ENTRY = struct.Struct("<BBH124s")
"""Phase, whether it runs alone, attempt, id of the job; the phase of a free entry is 0."""
LONGEST_ID = 124
CAPACITY = 256
"""Four times the most slots that an inferer may have: cancelled jobs may still be preparing."""
SIZE = HEADER_BYTES + CAPACITY * ENTRY.size


class Phase(IntEnum):
    """What is being done for a job."""

    QUEUED = 1
    TEMPLATE = 2
    TOKENIZING = 3
    SCHEMA = 4
    PROMPT = 5
    TOKENS = 6
    INPUTS = 7


DOING = {
    Phase.QUEUED: "before its first token",
    Phase.TEMPLATE: "rendering its chat template",
    Phase.TOKENIZING: "tokenizing its prompt",
    Phase.SCHEMA: "compiling its schema",
    Phase.PROMPT: "computing its prompt",
    Phase.TOKENS: "generating its tokens",
    Phase.INPUTS: "computing its inputs",
}


@dataclass(frozen=True)
class Running:
    """A job as the inferer was running it."""

    id: str
    attempt: int
    alone: bool
    phase: Phase


class Entry:
    """One job's place in the memory. Its phase may be set from any thread."""

    def __init__(self, memory: mmap.mmap | None, offset: int) -> None:
        self._memory = memory
        self.offset = offset

    def enter(self, phase: Phase) -> None:
        """From now on this is being done for the job."""
        if self._memory is not None:
            self._memory[self.offset] = phase

    def close(self) -> None:
        """The job is no longer running here."""
        if self._memory is not None:
            self._memory[self.offset] = 0
            self._memory = None


class FlightRecorder:
    """The whole memory: what the process itself is doing, and an entry for each running job."""

    def __init__(self, fd: int = -1) -> None:
        """Map the file ``fd``, which has `SIZE` bytes; without one, memory that dies with us."""
        self._memory = mmap.mmap(fd, SIZE)

    def describe(self, inferer: str, model: str, stage: str) -> None:
        """Record who this is, and what it does apart from jobs: ``loading the model``."""
        text = json.dumps({"inferer": inferer, "model": model, "stage": stage}).encode()
        self._memory[:HEADER_BYTES] = text[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")

    def open(self, job_id: str, attempt: int, alone: bool) -> Entry:
        """An entry for a job that starts now; it records nothing if no space is left."""
        name = job_id.encode()
        if len(name) > LONGEST_ID:
            return Entry(None, 0)
        for offset in range(HEADER_BYTES, SIZE, ENTRY.size):
            if self._memory[offset] == 0:
                ENTRY.pack_into(self._memory, offset, Phase.QUEUED, alone, attempt & 0xFFFF, name)
                return Entry(self._memory, offset)
        return Entry(None, 0)

    def description(self) -> dict[str, str]:
        """What `describe` was last given; empty before."""
        try:
            found: dict[str, str] = json.loads(self._memory[:HEADER_BYTES].rstrip(b"\0"))
        except ValueError:
            return {}
        return found

    def running(self) -> list[Running]:
        """The jobs that are running, or were when the process died."""
        entries = ENTRY.iter_unpack(self._memory[HEADER_BYTES:])
        return [
            Running(name.rstrip(b"\0").decode(errors="replace"), attempt, bool(alone), Phase(phase))
            for phase, alone, attempt, name in entries
            if phase in Phase._value2member_map_
        ]
