"""Whether sequences are computed in one batch, or side by side: ``INFERER_BATCHING``."""

import ctypes
import time
from contextlib import ExitStack
from math import inf
from statistics import geometric_mean

from services.inferer.engine.context import DECODED, Context, ContextOptions, EngineMemory
from services.inferer.engine.model import Model
from services.inferer.engine.scheduler import Chunk
from services.inferer.engine.separate_contexts import SeparateContexts
from services.inferer.engine.sequence import Sequence
from services.inferer.engine.thread_pool import ThreadPools
from shared.errors import ModelError
from shared.logs import logger

ROUNDS = 3
STEPS = 3
"""In which the kernel finds a core for each thread: so many steps of each kind follow one another
in each round. The fastest of all rounds are compared."""
TIME_LIMIT_S = 1.0
"""For each number of sequences. A slow model has one step of each kind at least."""
GAIN = 1.1
"""How many times as fast separate contexts must be: they take more memory, and with long contexts
or many jobs a batch may be better although it is not with a few tokens."""
MOST_SEPARATE = 8
"""Contexts. With more slots there is one context, whatever was measured with fewer."""

log = logger()


def separate_is_faster(
    model: Model, slots: int, options: ContextOptions, pools: ThreadPools
) -> bool:
    """Whether separate contexts compute one token of each of their sequences in less time than one
    context does: with two sequences, and with ``slots``, on average. Measured in small contexts."""
    not_set = ctypes.create_string_buffer(2)
    small = options._replace(n_ctx=2 * ROUNDS * STEPS, n_batch=slots)
    try:
        with ExitStack() as stack:
            together = Context(model, slots, small, not_set, pools.all)
            stack.callback(together.close)
            separate = SeparateContexts(model, slots, small, not_set, pools)
            stack.callback(separate.close)
            gain = _gain(together, separate, 2, pools)
            if slots > 2 and gain > 1:  # it shrinks with the number of sequences
                gain = geometric_mean((gain, _gain(together, separate, slots, pools)))
    except ModelError as error:  # most likely too little memory for both
        log.warning("batching_not_measured", error=error.message)
        return False
    is_faster = gain >= GAIN
    log.info("batching_measured", gain=round(gain, 2), separate_contexts=is_faster)
    return is_faster


def _gain(
    together: EngineMemory, separate: EngineMemory, sequences: int, pools: ThreadPools
) -> float:
    """How many times as fast ``separate`` computes a token of each of so many sequences."""
    fastest = {together: inf, separate: inf}
    enough_at = time.perf_counter() + TIME_LIMIT_S
    for _ in range(ROUNDS):
        for memory in fastest:
            pools.pause()  # the threads of one must not disturb the other
            for _ in range(STEPS):
                fastest[memory] = min(fastest[memory], _step_s(memory, sequences))
                if time.perf_counter() > enough_at:
                    break
        if time.perf_counter() > enough_at:
            break
    return fastest[together] / fastest[separate]


def _step_s(memory: EngineMemory, sequences: int) -> float:
    """Seconds for a token of each sequence."""
    batch = []
    at_once = min(sequences, memory.at_once or sequences)
    for slot in range(at_once):
        sequence = Sequence()
        sequence.slot, sequence.position = slot, memory.length(slot)
        sequence.tokens = [0] * (sequence.position + 1)
        batch.append(Chunk(sequence, 1, True, []))
    started = time.perf_counter()
    if memory.decode(batch) != DECODED:
        raise ModelError("llama.cpp could not compute a token of each slot")
    return (time.perf_counter() - started) * sequences / at_once
