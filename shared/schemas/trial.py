"""``python -m shared.schemas.trial``: tries schemas, and checks answers under them, within limits.

llguidance counts most of its work, but not all: a large `multipleOf`, patterns that must all
match, or a `const` of many values keep it busy for minutes, in a call that nothing can stop. Here
it runs in a process that can be killed. What passed takes the inferer about as long again.

The first request is null; the response is null when the process is ready. Each further request is
`[schema]` or `[schema, answer]`; the response is null, or why the schema is refused, or why the
answer is not valid. A request can also be an object, a ``response_format`` of the type `grammar` or
`regex`; then the response is null, or why it is refused.
"""

import json
import resource
from pathlib import Path

import llguidance
import msgspec

from shared.bounded.server import limit_memory, read_request, requests, respond
from shared.schemas.compiler import compile_lark, compile_schema, error_text, lark_language
from shared.schemas.validator import answer_error, read_json, validator_of
from shared.wire.requests import GrammarFormat, RegexFormat

MEMORY_BYTES = 128 * 2**20
"""The memory limit, in addition to what the process uses when it is ready."""
CPU_S = 1.0
"""The limit for one request, which typically takes milliseconds."""


class _Bytes:
    """The smallest possible tokenizer: compiling hardly depends on it."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def tokenizer_of_bytes() -> llguidance.LLTokenizer:
    """One token for each byte, and one that ends the text."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=257)


def error_of(request: bytes, tokenizer: llguidance.LLTokenizer) -> str | None:
    """The response to ``request``.

    Raises:
        MemoryError, ValueError, RecursionError: its message is the response.
    """
    if request.startswith(b"{"):
        form = msgspec.json.decode(request, type=GrammarFormat | RegexFormat)
        matcher = compile_lark(f"start: {lark_language(form)}", tokenizer)
        matcher.compute_bitmask()
        return "no text matches it" if matcher.is_stopped() and not matcher.is_accepting() else None
    schema, *answers = read_json(request)
    validator = validator_of(schema)
    if answers:
        return answer_error(validator, answers[0])
    matcher = compile_schema(json.loads(request)[0], tokenizer)
    first_bytes = matcher.compute_bitmask()[: 256 // 8]  # without the end
    if not any(first_bytes):
        return error_text(matcher) or "this schema cannot be enforced: no answer is valid under it"
    return None


def main() -> None:
    tokenizer = tokenizer_of_bytes()
    validator_of({"type": "object"})
    compile_schema({"type": "object"}, tokenizer)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_memory(pages * resource.getpagesize() + MEMORY_BYTES)
    read_request()
    respond(None)
    for request in requests(CPU_S):
        try:
            respond(error_of(request, tokenizer))
        except RecursionError:
            respond("the schema is nested too deeply; make it simpler")
        except (MemoryError, ValueError) as error:
            respond(str(error) or "the schema takes too much memory to compile; make it simpler")


if __name__ == "__main__":
    main()
