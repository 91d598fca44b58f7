"""The effect of other compiler flags for llama.cpp: prompt and answer tokens per second of several
compiled libraries on the inferer's own engine, and their ratios to the first.

Each figure comes from its own process, because a library is loaded once, and its position in memory
affects its speed by a few percent. The libraries take turns; the figures are medians of all rounds.
One thread is measured in CPU time, and so also on a busy machine; more threads need an idle one.

    .venv/bin/python -m benchmarks.flags [--model M] [--rounds N] [--threads N] \\
        installed NAME=FOLDER ...

A name alone is the library of this environment; a folder holds ``libllama.so`` and all it needs.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue

import msgspec

from benchmarks.measuring import THREADS, arguments, describe_machine, spread
from services.inferer.engine.engine import Engine
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.library import compiled_for
from services.inferer.engine.model import Model
from services.inferer.engine.sampler import Sampler
from services.inferer.settings import InfererSettings
from shared.model_files import locate
from shared.wire.requests import Sampling

ROUNDS = 8
PROMPT_TOKENS, ANSWER_TOKENS = 256, 48


class Speed(msgspec.Struct):
    """Tokens per second, and what the library was compiled for."""

    prompt: float
    answer: float
    features: list[str]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("libraries", nargs="*", default=["installed"], metavar="NAME[=FOLDER]")
    options = parser.parse_args()
    libraries = dict(library.partition("=")[::2] for library in options.libraries)
    print(f"flags: {describe_machine()}, {options.model}, {options.threads} thread(s)")
    speeds: dict[str, list[Speed]] = {name: [] for name in libraries}
    for number in range(options.rounds):
        turns = list(libraries.items())
        for name, folder in turns if number % 2 else reversed(turns):
            speeds[name].append(_measured(options.model, options.threads, folder))
    first = next(iter(speeds.values()))
    for name, found in speeds.items():
        print(f"  {name}: {', '.join(found[0].features)}")
        for what in ("prompt", "answer"):
            figures = [getattr(speed, what) for speed in found]
            others = [getattr(speed, what) for speed in first]
            ratios = [this / that for this, that in zip(figures, others, strict=True)]
            print(f"    {what}  {spread(figures)} tokens/s, ratio {spread(ratios)}")
    return 0


def _measured(model: str, threads: int, folder: str) -> Speed:
    """By `measure`, in a process that loads the library in ``folder``."""
    library = {"LLAMA_CPP_LIB_PATH": str(Path(folder).resolve())} if folder else {}
    program = f"from benchmarks.flags import measure; measure({model!r}, {threads})"
    command = [sys.executable, "-c", program]
    output = subprocess.check_output(command, env={**os.environ, **library})
    return msgspec.json.decode(output, type=Speed)


def measure(name: str, threads: int) -> None:
    """Print the speed of the model called ``name`` with the library of this process."""
    clock = time.process_time if threads == 1 else time.perf_counter
    model = Model(locate(name), gpu_layers=0, chat=False)
    n_batch = InfererSettings().n_batch
    engine = Engine(model, slots=1, n_ctx=1024, n_batch=n_batch, threads=threads)
    _generate(engine, PROMPT_TOKENS, 1)
    started = clock()
    _generate(engine, PROMPT_TOKENS, 1)
    prompt_done = clock()
    _generate(engine, 1, ANSWER_TOKENS)
    speed = Speed(
        prompt=PROMPT_TOKENS / (prompt_done - started),
        answer=ANSWER_TOKENS / (clock() - prompt_done),
        features=compiled_for(),
    )
    print(msgspec.json.encode(speed).decode(), flush=True)
    os._exit(0)


def _generate(engine: Engine, prompt_tokens: int, max_tokens: int) -> None:
    text = engine.model.tokenize("The history of the lighthouse began. " * (PROMPT_TOKENS // 4))
    prompt = text[:prompt_tokens]
    ended: SimpleQueue[Generation | Exception] = SimpleQueue()
    engine.submit(
        GenerationSequence(
            prepare=lambda: (prompt, [Sampler(engine.model, Sampling(temperature=0), 0, prompt)]),
            max_tokens=max_tokens,
            stop=[],
            on_text=lambda _: None,
            on_end=ended.put,
        )
    )
    outcome = ended.get()
    if isinstance(outcome, Exception):
        raise outcome
    if outcome.completion_tokens < max_tokens:
        raise RuntimeError(f"{outcome.completion_tokens} tokens instead of {max_tokens}")


if __name__ == "__main__":
    sys.exit(main())
