"""``python -m services.inferer.bounded.schema_trial``: compiles schemas within limits.

llguidance counts most of its work, but not all: a large `multipleOf`, patterns that must all
match, or a `const` of many values keep it busy for minutes, in a call that nothing can stop. Here
it runs in a process that can be killed. What passed takes the inferer about as long again.

The first request is null; the response is null when the process is ready. Each further request is a
schema; the response is null or an error.
"""

import json
import resource
from pathlib import Path

import llguidance

from services.inferer.bounded.schema_compiler import compile_schema, error_text
from services.inferer.bounded.server import limit_memory, read_request, requests, respond

MEMORY_BYTES = 128 * 2**20
"""In addition to what the process has when it is ready."""
CPU_S = 1
"""For one schema, which typically takes some milliseconds."""


class _Bytes:
    """The smallest possible tokenizer: compiling hardly depends on it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> None:
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=257)
    compile_schema({"type": "object"}, tokenizer)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_memory(pages * resource.getpagesize() + MEMORY_BYTES)
    read_request()
    respond(None)
    for request in requests(CPU_S):
        try:
            matcher = compile_schema(json.loads(request), tokenizer)
            respond(error_text(matcher) if matcher.is_error() else None)
        except (MemoryError, ValueError, RecursionError) as error:
            respond(str(error) or type(error).__name__)


if __name__ == "__main__":
    main()
