"""``python -m services.inferer.schema_trial``: compiles schemas for an inferer, within bounds.

llguidance counts most of its work, but not all: a large `multipleOf`, patterns that must all
match, or a `const` of many values keep it busy for minutes, in a call that nothing can stop. Here
it is in a process that can be killed. What got through once takes the inferer as long again.

JSON comes in on stdin and goes out on stdout, a line each: first `null`, answered with `null` when
it is ready; then one schema after another, each answered with `null` or with what is wrong with it.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import llguidance

from services.inferer.schema_compiler import compiled, reason

MEMORY_BYTES = 128 * 2**20
"""On top of what the process has when it is ready."""
CPU_S = 1
"""For one schema. A usual one takes some milliseconds."""


class _Bytes:
    """The smallest tokenizer there is: what is compiled hardly depends on it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> None:
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=257)
    compiled({"type": "object"}, tokenizer)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.stdin.buffer.readline()
    _answer(None)
    for line in sys.stdin.buffer:
        _allow_cpu()
        try:
            matcher = compiled(json.loads(line), tokenizer)
            _answer(reason(matcher) if matcher.is_error() else None)
        except (MemoryError, ValueError, RecursionError) as error:
            _answer(str(error) or type(error).__name__)


def _allow_cpu() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _answer(answer: Any) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
