"""What every benchmark needs: a stack, a bare loop beside it, medians of alternated pairs."""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import llama_cpp

from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from shared.cpus import own_cpus, usable_cpus
from shared.wire.requests import Sampling
from tests.support.processes import Process, Stack

THREADS = usable_cpus()

SETTLE_S = 1.0
"""Between two measurements."""

T = TypeVar("T")


@contextmanager
def running_stack(
    model: Path, alias: str, inferers: int = 1, **environment: str
) -> Iterator[Stack]:
    """NATS, a gateway and ``inferers`` with ``model``, as processes of their own; the inferers
    share the CPUs out among themselves. ``environment`` is for all of them. The inferers compute
    every prompt whole, unless it says otherwise: benchmarks send the same prompt again and again.
    """
    with (
        tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder,
        Stack(Path(folder)) as stack,
    ):
        stack.start_gateway(**environment)
        for number in range(inferers):
            cpus = own_cpus()[number::inferers]
            threads = str(min(len(cpus), THREADS))
            own = {
                "INFERER_ALIAS": alias,
                "INFERER_THREADS": threads,
                "INFERER_CACHE_MB": "0",
                **environment,
            }
            stack.start_inferer(model, cpus, **own)
        stack.wait_until_served(alias, inferers)
        yield stack


class BareLoop:
    """llama.cpp's calls and nothing else: decode, sample, next. No queue, no thread, no text."""

    def __init__(
        self, path: Path, n_ctx: int = 4096, n_batch: int = 512, threads: int = THREADS
    ) -> None:
        self.model = Model(path, gpu_layers=-1)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self.model.handle, parameters)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def run(self, prompt: str, options: Sampling, seed: int, max_tokens: int) -> int:
        """Generate up to ``max_tokens``. Returns the number of tokens."""
        tokens = self.model.tokenize(prompt)
        sampler = Sampler(self.model, options, seed, tokens)
        llama_cpp.llama_memory_clear(self._memory, True)
        # The batch only points to these arrays.
        prompt_tokens = (llama_cpp.llama_token * len(tokens))(*tokens)
        single = (llama_cpp.llama_token * 1)()
        batch = llama_cpp.llama_batch_get_one(prompt_tokens, len(tokens))
        count = 0
        while count < max_tokens:
            if llama_cpp.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            token = sampler.sample(self._context, -1)
            if llama_cpp.llama_vocab_is_eog(self.model.vocab, token):
                break
            count += 1
            single[0] = token
            batch = llama_cpp.llama_batch_get_one(single, 1)
        sampler.close()
        return count

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        self.model.close()


def cpu_ms(process: Process) -> float:
    """The CPU time that a process and its descendants have taken so far."""
    ticks = 0
    for pid in process.family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return 1000 * ticks / os.sysconf("SC_CLK_TCK")


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternated(first: Callable[[], T], second: Callable[[], T], pairs: int) -> list[tuple[T, T]]:
    """``pairs`` of figures; which of the two goes first changes from pair to pair."""
    figures = []
    for number in range(pairs):
        if number % 2:
            right = second()
            figures.append((first(), right))
        else:
            left = first()
            figures.append((left, second()))
    return figures


def in_turn(subjects: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """One figure of each subject a round; every other round goes backwards. A pause before each:
    llama.cpp's server keeps a core busy for 0.2 s after its last answer."""
    figures: dict[str, list[T]] = {name: [] for name in subjects}
    for number in range(rounds):
        turns = list(subjects.items())
        for name, measure in reversed(turns) if number % 2 else turns:
            time.sleep(SETTLE_S)
            figures[name].append(measure())
    return figures


def spread(values: Sequence[float]) -> str:
    """``median [lower quartile .. upper quartile]``."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f} .. {high:.3f}]"


def arguments(documentation: str) -> argparse.ArgumentParser:
    """A parser for the program with this docstring, whose first paragraph describes it."""
    return argparse.ArgumentParser(description=documentation.partition("\n\n")[0])


def describe_machine() -> str:
    load = os.getloadavg()[0]
    return (
        f"{THREADS} usable CPUs, {platform.machine()}, Python {platform.python_version()}, "
        f"load before the run {load:.2f}"
    )
