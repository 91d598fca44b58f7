"""The child's side of a bounded process: a line of JSON on stdin is a request, a line on stdout its
response."""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any


def read_request() -> Any:
    """The next request."""
    return json.loads(sys.stdin.buffer.readline())


def requests(cpu_s: int) -> Iterator[bytes]:
    """All further requests, undecoded. Each may take ``cpu_s`` seconds of CPU time, rounded up;
    then the kernel ends the process, even if its inferer is gone."""
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
        # The soft limit has a signal of its own; SIGKILL can come from other processes, too.
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        yield line


def respond(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def limit_memory(size: int) -> None:
    """Limit the address space to ``size`` bytes. A crash leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
