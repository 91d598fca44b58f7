"""``python -m services.inferer.engine.speed_test``: how fast the engine computes here.

Loads the model that ``INFERER_*`` names as an inferer would. `sluice bench` starts it and decides
what is computed when; `shared/speed_test.py` has the messages.
"""

import asyncio
import ctypes
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import msgspec

from services.inferer.engine.engine import Engine
from services.inferer.engine.fitness import Fitness, check_fitness
from services.inferer.engine.generation import Generation, GenerationSequence
from services.inferer.engine.library import load_backends
from services.inferer.engine.model import Model
from services.inferer.engine.native_log import log_lines
from services.inferer.engine.sampler import Sampler
from services.inferer.engine.sequence import Aborted
from services.inferer.engine.set_up import load_model, start_engine
from services.inferer.settings import InfererSettings
from shared.config import load
from shared.cpus import usable_cpus
from shared.errors import ModelError, SluiceError
from shared.logs import configure_logs
from shared.model_files import locate
from shared.speed_test import Done, Failed, Jobs, Ready, Reply, Subject
from shared.wire.requests import Sampling

TEXT = "The tide comes in twice a day. "
POLL_S = 0.01


class TimedSampler(Sampler):
    """Samples as for a job without options, but never the end of the answer."""

    def __init__(self, model: Model, prompt: list[int], seed: int, at: list[float]) -> None:
        """``at`` gets the time of each token (`time.perf_counter`)."""
        super().__init__(model, Sampling(), seed, prompt)
        self._model, self._at, self._other = model, at, prompt[-1]

    def sample(self, context: object, row: int) -> int:
        token = super().sample(context, row)
        self._at.append(time.perf_counter())
        return self._other if self._model.piece(token) is None else token


class TimedJob:
    """A job on ``engine`` that is submitted at once, and when its tokens came."""

    def __init__(self, engine: Engine, prompt: list[int], max_tokens: int, seed: int = 1) -> None:
        """``prompt`` has at least one token."""
        self.at: list[float] = []
        self._engine = engine
        self._outcome: Generation | Exception | None = None
        self._ended = threading.Event()
        self.sequence = GenerationSequence(
            prepare=lambda: (prompt, [TimedSampler(engine.model, prompt, seed, self.at)]),
            max_tokens=max_tokens,
            stop=[],
            on_text=lambda _: None,
            on_end=self._end,
        )
        self.sequence.is_cold = True
        self.started = time.perf_counter()
        engine.submit(self.sequence)

    def _end(self, outcome: Generation | Exception) -> None:
        self._outcome = outcome
        self._ended.set()

    def wait(self, until: float | None = None, least: int = 0) -> float:
        """Wait for its end; at the time ``until``, but not before it has ``least`` tokens, abort
        it. Returns the seconds it took.

        Raises:
            SluiceError: it failed.
        """
        patience_s = None if until is None else max(0.0, until - time.perf_counter())
        while not self._ended.wait(patience_s):
            if len(self.at) >= least:
                self._engine.abort(self.sequence)
            patience_s = POLL_S
        if isinstance(self._outcome, Exception) and not isinstance(self._outcome, Aborted):
            raise self._outcome
        return time.perf_counter() - self.started


def main() -> int:
    configure_logs("inferer", stream=sys.stderr)  # stdout is for the replies
    try:
        subject = msgspec.json.decode(sys.argv[1], type=Subject)
        settings = load(InfererSettings, "INFERER")
        path = locate(settings.model)
        fitness = asyncio.run(check_fitness(settings, path))
        with _file(path, subject) as file:
            _serve(subject, settings, file, fitness)
    except SluiceError as error:
        _reply(Failed(error.code, error.message))
    # The kernel frees the memory; freeing it here would take time.
    os._exit(0)


def _serve(subject: Subject, settings: InfererSettings, path: Path, fitness: Fitness) -> None:
    """Raises: SluiceError."""
    model = load_model(settings, path, extra_buffers=fitness.extra_buffers, chat=False)
    if not model.generates_text:
        raise ModelError(
            f"the model {path} generates no text; give one that does: this measures generation"
        )
    engine = start_engine(settings, model, slots=subject.slots, speculation=None)
    _reply(
        Ready(
            quantization=model.quantization,
            n_ctx=engine.n_ctx,
            threads=engine.threads,
            gpu_layers=model.gpu_layers,
            warning=fitness.warning,
        )
    )
    for line in sys.stdin:
        _reply(run(engine, msgspec.json.decode(line, type=Jobs)))


def _reply(reply: Reply) -> None:
    print(msgspec.json.encode(reply).decode(), flush=True)


@contextmanager
def _file(path: Path, subject: Subject) -> Iterator[Path]:
    """The file to load. A converted one has no name, so that nothing is left of it however this
    process ends.

    Raises:
        ModelError: the model cannot be converted.
    """
    if not subject.as_q4_0:
        yield path
        return
    with tempfile.TemporaryFile(prefix="sluice-bench-") as file:
        if shutil.disk_usage(tempfile.gettempdir()).free < 2 * path.stat().st_size:
            raise ModelError(f"not enough free space in {tempfile.gettempdir()}; set TMPDIR")
        converted = Path(f"/proc/self/fd/{file.fileno()}")
        _convert(path, converted)
        yield converted


def _convert(path: Path, converted: Path) -> None:
    """Write the model at ``path`` as Q4_0. Converting from a quantized file costs quality, not
    speed.

    Raises:
        ModelError: llama.cpp cannot do it.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.allow_requantize = True
    parameters.nthread = usable_cpus()
    load_backends()
    with log_lines() as lines:
        status = llama_cpp.llama_model_quantize(
            bytes(path), bytes(converted), ctypes.byref(parameters)
        )
    if status != 0:
        reason = lines[-1] if lines else "no reason given"
        raise ModelError(f"llama.cpp cannot convert it: {reason}")


def run(engine: Engine, jobs: Jobs) -> Done:
    """One job in each slot of ``engine``; the prompts are cut to half of the context.

    Raises:
        SluiceError: a job failed.
    """
    length = max(1, min(jobs.prompt_tokens, engine.n_ctx // 2))
    prompt = engine.model.tokenize(TEXT * length)[:length]
    started = time.perf_counter()
    until = started + jobs.limit_s
    running = [
        TimedJob(engine, prompt, jobs.answer_tokens, seed) for seed in range(1, engine.slots + 1)
    ]
    for job in running:
        job.wait(until, min(jobs.answer_tokens, 2))  # with fewer no speed can be measured
    generating = max(job.at[0] for job in running)
    ended = max(job.at[-1] for job in running)
    return Done(
        prompt_tokens=length * len(running),
        prompt_s=generating - started,
        answer_tokens=sum(at > generating for job in running for at in job.at),
        answer_s=ended - generating,
    )


if __name__ == "__main__":
    sys.exit(main())
