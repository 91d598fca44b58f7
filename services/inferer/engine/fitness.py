"""Whether, and how, this machine can run this model: tested before any job arrives.

The self-test runs in a separate process. If a signal kills it, it runs once more without extra
buffers, which is slower and avoids the code that is most often wrong (AMX, repacked weights). The
result is cached, so that a start with the same library, model, CPU and settings skips the test,
unless it was killed from outside or took too long.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from services.inferer.engine import self_test
from services.inferer.engine.adapters import adapter_files
from services.inferer.engine.library import library_folder
from services.inferer.engine.self_test_record import load_record, save_record
from services.inferer.engine.speed import MeasuredSpeed
from services.inferer.settings import InfererSettings
from shared.cpus import cpu_flags, cpu_model, usable_cpus
from shared.errors import ModelError
from shared.logs import logger
from shared.process.exit_status import describe_exit
from shared.process.lifecycle import EXIT_CONFIGURATION
from shared.process.parent_death import die_with_parent

CRASHES = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
"""Signals that the same code causes again. Any other signal came from outside: memory or time was
short."""

HOW_TO_COMPILE = "compile it on this machine as docs/compiling.md says (rm -r .venv && make .venv)"

log = logger()


class Fitness(Struct, frozen=True):
    """How to load a model; ``warning`` is the reason if it is not the default."""

    extra_buffers: bool = True
    warning: str | None = None
    speed: MeasuredSpeed = MeasuredSpeed()
    """Of the self-test."""


class _Exit(Struct, frozen=True):
    """How a self-test ended: by itself with ``status``, or by the signal -``status``."""

    status: int
    loaded: bool
    adapter: str
    """The last one that was tested; empty before the first."""
    last_line: str
    speed: MeasuredSpeed = MeasuredSpeed()

    @property
    def was_killed(self) -> bool:
        return self.status < 0

    @property
    def may_differ(self) -> bool:
        """Whether the next self-test may have another result."""
        return self.was_killed and -self.status not in CRASHES

    @property
    def description(self) -> str:
        when = "at its first computation" if self.loaded else "while it loaded the model"
        if self.adapter:
            when += f" with the adapter {self.adapter}"
        if self.status == -signal.SIGALRM:
            return f"hung {when}"
        line = f" ({self.last_line})" if self.last_line else ""
        return f"died of {describe_exit(self.status)} {when}{line}"


async def check_fitness(settings: InfererSettings, path: Path) -> Fitness:
    """Run the self-test of the model at ``path``, or read its cached result.

    Raises:
        ModelError: llama.cpp crashes, or reports an error.
        SettingsError: the folder of adapters cannot be used.
    """
    key = _cache_key(settings, path)
    fitness = load_record(key, Fitness)
    if fitness is None:
        started = time.perf_counter()
        fitness, may_differ = await _test(path)
        if not may_differ:
            save_record(key, fitness)
        log.info("self_test_passed", ms=round((time.perf_counter() - started) * 1000))
    if fitness.warning is not None:
        log.warning("computing_without_extra_buffers", why=fitness.warning)
    return fitness


async def _test(path: Path) -> tuple[Fitness, bool]:
    """The fitness, and whether it may differ at the next start."""
    first = await _run_self_test(path)
    if not first.was_killed:
        return Fitness(speed=first.speed), False
    second = await _run_self_test(path, self_test.WITHOUT_EXTRA_BUFFERS)
    cpu = cpu_model()
    if second.was_killed:
        other = "leave out that adapter" if second.adapter else "try another model file"
        raise ModelError(
            f"llama.cpp {second.description}, on this CPU ({cpu}) with the model {path}; "
            f"{HOW_TO_COMPILE}, or {other}"
        )
    fitness = Fitness(
        extra_buffers=False,
        warning=f"llama.cpp {first.description}, on this CPU ({cpu}), and computes without extra "
        f"buffers (AMX, repacked weights), which is slower; {HOW_TO_COMPILE}",
        speed=second.speed,
    )
    return fitness, first.may_differ


async def _run_self_test(path: Path, *options: str) -> _Exit:
    """Raises: ModelError: the self-test failed by itself."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", self_test.__name__, *options),
        env={**os.environ, "INFERER_MODEL": str(path)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the inferer, which ends this process
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    printed = output.decode(errors="replace").split()
    tested = (word for word in reversed(printed) if word.startswith(self_test.ADAPTER))
    result = _Exit(
        status=process.returncode or 0,
        loaded=self_test.LOADED in printed,
        adapter=next(tested, "").removeprefix(self_test.ADAPTER),
        last_line=lines[-1].strip() if lines else "",
        speed=_speed(printed),
    )
    if result.status == EXIT_CONFIGURATION:
        raise ModelError(result.last_line)
    if result.status > 0:
        raise ModelError(f"the self-test ended with status {result.status}: {result.last_line}")
    return result


def _speed(printed: list[str]) -> MeasuredSpeed:
    try:
        return msgspec.json.decode(printed[-1], type=MeasuredSpeed)
    except (IndexError, msgspec.DecodeError):
        return MeasuredSpeed()  # it was killed


def _cache_key(settings: InfererSettings, path: Path) -> list[object]:
    """Everything that the result depends on."""
    libraries = sorted(library_folder().glob("*.so*"))
    return [
        list(Fitness.__struct_fields__),
        [_identity(library) for library in libraries],
        _identity(path.resolve()),
        [_identity(file.resolve()) for file in _adapters(settings)],
        [cpu_model(), sorted(cpu_flags()), os.uname().release],
        [settings.gpu_layers, settings.split_mode, settings.main_gpu],
        [settings.flash_attention, settings.kv_type, settings.cache_mb > 0],
        [settings.n_ctx, settings.n_batch, settings.slots, settings.threads or usable_cpus()],
    ]


def _adapters(settings: InfererSettings) -> Iterable[Path]:
    """Raises: SettingsError: their folder cannot be used."""
    folder = settings.adapters_folder
    return adapter_files(folder).values() if folder else ()


def _identity(file: Path) -> list[object]:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]
