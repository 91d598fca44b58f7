"""The child's side of a bounded process: a line of JSON on stdin is a request, a line on stdout its
response."""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any


def read_request() -> Any:
    """The next request."""
    return json.loads(sys.stdin.buffer.readline())


def requests(cpu_s: float) -> Iterator[bytes]:
    """All further requests, undecoded. Each may take ``cpu_s`` seconds of CPU time; then the kernel
    ends the process, even if its parent is gone."""
    for line in sys.stdin.buffer:
        # SIGPROF ends it, also in native code. SIGKILL can come from other processes, too.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        yield line
        signal.setitimer(signal.ITIMER_PROF, 0)


def respond(value: Any) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def limit_memory(size: int) -> None:
    """Limit the address space to ``size`` bytes. A crash leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
