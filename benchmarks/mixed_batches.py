"""The most throughput that a stream and a long prompt can have at the same time, with llama.cpp
alone. Each batch has one token of an answer and a chunk of a prompt of 7,000 tokens, half of which
has been computed. Prints both speeds as fractions of the speed that each has alone. Alternating two
kinds of batches gives any point on the line between them, and nothing better. Measured with a KV
cache for each sequence, as in Sluice, and with one for both.

    .venv/bin/python -m benchmarks.mixed_batches
"""

import sys
from collections.abc import Callable
from itertools import combinations
from statistics import median

import llama_cpp

from benchmarks.measuring import THREADS, arguments, describe_machine, seconds
from services.inferer.engine.model import Model
from services.inferer.engine.speed_test import TEXT
from shared.model_files import locate

N_CTX, N_BATCH = 8192, 512
ANSWER_TOKENS, PROMPT_TOKENS = 200, 3500
CHUNKS = (8, 32, 128, 512)
REPEATS = 3
WANTED_OF_ANSWER, WANTED_OF_PROMPT = 0.7, 0.5
ANSWER, PROMPT = 0, 1

Point = tuple[float, float]
"""The speed of the answer and of the prompt, each as a fraction of its speed alone."""


def main() -> int:
    arguments(__doc__).parse_args()
    print(f"an answer beside a prompt, llama.cpp alone: {describe_machine()}")
    model = Model(locate("smollm2"), gpu_layers=-1)
    tokens = model.tokenize(TEXT * 1000)
    for name, unified in (("a cache for each", False), ("one cache for both", True)):
        context = _TwoSequences(model, tokens, unified)
        alone_s = {chunk: context.seconds(chunk, beside=False) for chunk in CHUNKS}
        prompt_s = min(took / chunk for chunk, took in alone_s.items())
        answer_s = context.seconds(0, beside=True)
        points = [(1.0, 0.0), (0.0, 1.0)]
        print(f"  {name}: a token of the answer {1000 * answer_s:.1f} ms, of the prompt", end=" ")
        print(f"{1000 * prompt_s:.2f} ms, alone")
        for chunk in CHUNKS:
            took = context.seconds(chunk, beside=True)
            point = answer_s / took, chunk * prompt_s / took
            points.append(point)
            print(
                f"    {chunk:4} tokens of the prompt: {1000 * took:6.1f} ms, the answer has", end=""
            )
            print(f" {point[0]:.2f} of its speed, the prompt {point[1]:.2f}")
        most = max(_at(WANTED_OF_ANSWER, pair) for pair in combinations(points, 2))
        print(
            f"    where the answer has {WANTED_OF_ANSWER}, the prompt can have {most:.2f};", end=""
        )
        print(f" to end within twice its time it needs {WANTED_OF_PROMPT}")
        context.close()
    model.close()
    return 0


def _at(answer: float, pair: tuple[Point, Point]) -> float:
    """The speed of the prompt on the line between two points, where the answer has ``answer``."""
    (low, of_low), (high, of_high) = sorted(pair)
    if not low <= answer <= high or low == high:
        return 0.0
    return of_low + (of_high - of_low) * (answer - low) / (high - low)


class _TwoSequences:
    """A context with the two sequences."""

    def __init__(self, model: Model, tokens: list[int], unified: bool) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = N_CTX * (1 if unified else 2)
        parameters.n_seq_max = 2
        parameters.kv_unified = unified
        parameters.n_batch = parameters.n_ubatch = N_BATCH + 1
        parameters.n_threads = parameters.n_threads_batch = THREADS
        self._context = llama_cpp.llama_init_from_model(model.handle, parameters)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(N_BATCH + 1, 0, 1)
        self._tokens = tokens
        self._lengths = {ANSWER: 0, PROMPT: 0}
        for sequence, length in ((ANSWER, ANSWER_TOKENS), (PROMPT, PROMPT_TOKENS)):
            while self._lengths[sequence] < length:
                step = min(N_BATCH, length - self._lengths[sequence])
                self._decode({sequence: step})
                self._lengths[sequence] += step

    def seconds(self, chunk: int, beside: bool) -> float:
        """Of a batch with ``chunk`` tokens of the prompt, and one of the answer ``beside`` them."""
        counts = {ANSWER: int(beside), PROMPT: chunk}

        def step() -> None:
            self._decode(counts)

        return median(self._timed(step) for _ in range(REPEATS))

    def _timed(self, step: Callable[[], None]) -> float:
        took = seconds(step)
        for sequence, length in self._lengths.items():
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return took

    def _decode(self, counts: dict[int, int]) -> None:
        batch, row = self._batch, 0
        for sequence, count in counts.items():
            begin = self._lengths[sequence]
            for position in range(begin, begin + count):
                batch.token[row] = self._tokens[position]
                batch.pos[row] = position
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = position == begin + count - 1
                row += 1
        batch.n_tokens = row
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


if __name__ == "__main__":
    sys.exit(main())
