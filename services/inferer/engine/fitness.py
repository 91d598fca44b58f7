"""Whether, and how, this machine can compute with this model: tested before any job arrives.

The self-test runs in a separate process. If it dies of a signal, it runs once more without extra
buffers, which is slower and avoids the code that is most often wrong (AMX, repacked weights). The
outcome is stored, so that a start with the same library, model, CPU and settings skips the test,
unless it was killed from outside or took too long.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from msgspec import Struct

from services.inferer.engine import self_test
from services.inferer.engine.library import library_folder
from services.inferer.engine.self_test_record import recall, record
from services.inferer.settings import InfererSettings
from shared.cpus import cpu_flags, cpu_model, usable_cpus
from shared.errors import ModelError
from shared.logs import logger
from shared.process.exit_status import describe_exit
from shared.process.lifecycle import EXIT_CONFIGURATION

CRASHES = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
"""The same code dies of them again. Any other signal came from outside, where memory or time was
short."""

HOW_TO_COMPILE = "compile it on this machine as docs/compiling.md says (rm -r .venv && make .venv)"

log = logger()


class Fitness(Struct, frozen=True):
    """How a model is to be loaded; ``warning`` says why not as usual."""

    extra_buffers: bool = True
    warning: str | None = None


class _End(Struct, frozen=True):
    """How one self-test ended: by itself with ``status``, or by a signal that is -``status``."""

    status: int
    loaded: bool
    last_words: str

    @property
    def died(self) -> bool:
        return self.status < 0

    @property
    def may_pass(self) -> bool:
        """Whether the next self-test may end otherwise."""
        return self.died and -self.status not in CRASHES

    @property
    def how(self) -> str:
        when = "at its first computation" if self.loaded else "while it loaded the model"
        if self.status == -signal.SIGALRM:
            return f"hung {when}"
        words = f" ({self.last_words})" if self.last_words else ""
        return f"died of {describe_exit(self.status)} {when}{words}"


async def examine(settings: InfererSettings, path: Path) -> Fitness:
    """Find out, or remember, whether the model at ``path`` can be computed with.

    Raises:
        ModelError: it cannot: llama.cpp dies, or says why.
    """
    circumstances = _circumstances(settings, path)
    fitness = recall(circumstances, Fitness)
    if fitness is None:
        started = time.perf_counter()
        fitness, may_pass = await _find_out(path)
        if not may_pass:
            record(circumstances, fitness)
        log.info("self_test_passed", ms=round((time.perf_counter() - started) * 1000))
    if fitness.warning is not None:
        log.warning("computing_without_extra_buffers", why=fitness.warning)
    return fitness


async def _find_out(path: Path) -> tuple[Fitness, bool]:
    """The fitness, and whether it may be another at the next start."""
    usual = await _run_self_test()
    if not usual.died:
        return Fitness(), False
    cautious = await _run_self_test(self_test.WITHOUT_EXTRA_BUFFERS)
    cpu = cpu_model()
    if cautious.died:
        raise ModelError(
            f"llama.cpp {cautious.how}, on this CPU ({cpu}) with the model {path}; "
            f"{HOW_TO_COMPILE}, or try another model file"
        )
    fitness = Fitness(
        extra_buffers=False,
        warning=f"llama.cpp {usual.how}, on this CPU ({cpu}), and computes without extra buffers "
        f"(AMX, repacked weights), which is slower; {HOW_TO_COMPILE}",
    )
    return fitness, usual.may_pass


async def _run_self_test(*options: str) -> _End:
    """Raises: ModelError: it ended by itself, and not well."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", self_test.__name__, *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us, and we end it
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    end = _End(
        status=process.returncode or 0,
        loaded=self_test.LOADED in output.decode(errors="replace").split(),
        last_words=lines[-1].strip() if lines else "",
    )
    if end.status == EXIT_CONFIGURATION:
        raise ModelError(end.last_words)
    if end.status > 0:
        raise ModelError(f"the self-test ended with status {end.status}: {end.last_words}")
    return end


def _circumstances(settings: InfererSettings, path: Path) -> list[object]:
    """Everything that what was found depends on."""
    libraries = sorted(library_folder().glob("*.so*"))
    return [
        [_identity(library) for library in libraries],
        _identity(path.resolve()),
        [cpu_model(), sorted(cpu_flags()), os.uname().release],
        [settings.gpu_layers, settings.threads or usable_cpus()],
        [settings.n_ctx, settings.n_batch, settings.concurrency],
    ]


def _identity(file: Path) -> list[object]:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]
