"""Why one at a time: the same jobs in one process with more and more slots, which share each batch,
and in two processes that both want all CPUs, beside the same two one after the other.

    .venv/bin/python -m benchmarks.concurrency
"""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

from benchmarks.measuring import THREADS, BareLoop, describe_machine, seconds
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import GenerationSequence
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.settings import InfererSettings
from shared.model_files import locate
from shared.wire.requests import Sampling

JOBS, TOKENS, ROUNDS = 8, 96, 5
PROMPT, OPTIONS = "The history of the lighthouse began", Sampling(temperature=0.8)
SLOTS = (1, 2, 4, 8)


def main() -> int:
    print(f"concurrency: {describe_machine()}")
    model = Model(locate("smollm2"), gpu_layers=-1)
    engines = {
        slots: Engine(
            model, slots=slots, n_ctx=1024, n_batch=InfererSettings().n_batch, threads=THREADS
        )
        for slots in SLOTS
    }
    took: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    for _ in range(ROUNDS):
        for slots, engine in engines.items():
            took[slots].append(seconds(partial(_run, engine)))
    for engine in engines.values():
        engine.close()
    model.close()
    alone = median(took[1])
    for slots, values in took.items():
        each_s = median(values) * slots / JOBS
        print(
            f"  {slots} slot(s): {JOBS * TOKENS / median(values):5.0f} tokens/s in all "
            f"({alone / median(values):.2f} times one slot), a job takes {each_s:.2f} s"
        )
    with _worker() as first, _worker() as second:
        apart = [seconds(partial(_ask_in_turn, first, second)) for _ in range(ROUNDS)]
        together = [seconds(lambda: _ask(first, second)) for _ in range(ROUNDS)]
    print(
        f"  two processes with {THREADS} threads each: two jobs one after the other "
        f"{median(apart):.2f} s, at once {median(together):.2f} s "
        f"({min(together):.2f} to {max(together):.2f}): "
        f"{median(together) / median(apart):.1f} times as long"
    )
    return 0


def _run(engine: Engine) -> None:
    """Run all jobs on the engine, each with ``TOKENS`` tokens."""
    ended = threading.Semaphore(0)
    for seed in range(JOBS):
        engine.submit(
            GenerationSequence(
                prepare=partial(_prepare, engine.model, seed),
                max_tokens=TOKENS,
                stop=[],
                on_text=lambda text: None,
                on_end=lambda outcome: ended.release(),
            )
        )
    for _ in range(JOBS):
        ended.acquire()


def _prepare(model: Model, seed: int) -> tuple[list[int], Sampler]:
    tokens = model.tokenize(PROMPT)
    return tokens, Sampler(model, OPTIONS, seed, tokens)


@contextmanager
def _worker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.concurrency", "worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        _ask(process)  # loaded
        yield process
    finally:
        process.communicate("")


def _ask(*workers: subprocess.Popen[str]) -> None:
    """One job each, at the same moment."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.stdout is not None
        if worker.stdout.readline() != "done\n":
            raise RuntimeError("a worker died")


def _ask_in_turn(*workers: subprocess.Popen[str]) -> None:
    """One job each, one after the other."""
    for worker in workers:
        _ask(worker)


def _work() -> int:
    loop = BareLoop(locate("smollm2"))
    for _ in sys.stdin:
        loop.run(PROMPT, OPTIONS, 1, TOKENS)
        print("done", flush=True)
    loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(_work() if sys.argv[1:] == ["worker"] else main())
