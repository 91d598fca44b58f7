"""The side of a bounded process that answers: JSON comes in on stdin and goes out on stdout, a line
each."""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any


def read() -> Any:
    """The next question."""
    return json.loads(sys.stdin.buffer.readline())


def questions(cpu_s: int) -> Iterator[bytes]:
    """All questions, undecoded. For each there are at most so many seconds of CPU, rounded up; then
    the kernel ends the process, also where its inferer is gone."""
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
        # The signal of the soft limit is the process's own, not one that others send (SIGKILL).
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        yield line


def answer(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def bound_memory(size: int) -> None:
    """Of the whole address space, in bytes. A death leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
