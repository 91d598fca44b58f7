"""``python -m tests.support.footprint MODEL N_CTX N_BATCH CONTEXTS``: the memory of contexts.

``CONTEXTS`` is JSON: ``[slots, kv_type]`` of each. Prints what the check before a
growth says and what the process then has, in bytes, as JSON.
"""

import ctypes
import gc
import json
import sys
from multiprocessing import get_context
from pathlib import Path

from services.inferer.engine.context import DECODED, Context, ContextOptions, required_bytes
from services.inferer.engine.model import Model
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.sequence import Sequence

model: Model


def main(path: str, n_ctx: str, n_batch: str, contexts: str) -> None:
    global model
    model = Model(Path(path), gpu_layers=0, chat=False)
    jobs = [
        (slots, ContextOptions(int(n_ctx), int(n_batch), 1, kv_type))
        for slots, kv_type in json.loads(contexts)
    ]
    # Each in a process of its own, which finds no memory that another has freed.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.starmap(measure, jobs, chunksize=1)))


def measure(slots: int, options: ContextOptions) -> tuple[int, int]:
    """The bytes that the check says, and those that are taken when a batch was computed that has
    tokens of every slot."""
    said = required_bytes(model, slots, options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_bytes()
    context = Context(model, slots, options, ctypes.create_string_buffer(2))
    size = options.n_batch // slots
    batch = [Chunk(sequence(slot, size), size, has_output=True, draft=[]) for slot in range(slots)]
    assert context.decode(batch) == DECODED
    return said, anonymous_bytes() - before


def sequence(slot: int, length: int) -> Sequence:
    made = Sequence()
    made.slot, made.tokens = slot, [5] * length
    return made


def anonymous_bytes() -> int:
    """What this process has in memory, apart from files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
