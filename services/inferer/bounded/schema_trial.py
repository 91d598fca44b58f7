"""``python -m services.inferer.bounded.schema_trial``: compiles schemas for an inferer in bounds.

llguidance counts most of its work, but not all: a large `multipleOf`, patterns that must all
match, or a `const` of many values keep it busy for minutes, in a call that nothing can stop. Here
it is in a process that can be killed. What got through once takes the inferer as long again.

The first question is null, answered with null when it is ready; then comes one schema after
another, each answered with null or with what is wrong with it.
"""

import json
import resource
from pathlib import Path

import llguidance

from services.inferer.bounded.answering import answer, bound_memory, questions, read
from services.inferer.bounded.schema_compiler import compiled, reason

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
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound_memory(pages * resource.getpagesize() + MEMORY_BYTES)
    read()
    answer(None)
    for question in questions(CPU_S):
        try:
            matcher = compiled(json.loads(question), tokenizer)
            answer(reason(matcher) if matcher.is_error() else None)
        except (MemoryError, ValueError, RecursionError) as error:
            answer(str(error) or type(error).__name__)


if __name__ == "__main__":
    main()
