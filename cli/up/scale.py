"""How many inferers `sluice up` runs, and on which CPUs."""

import os

import msgspec
from msgspec import Struct

from cli.exit_status import EXIT_USAGE, CommandError
from shared.config import StartConcurrency
from shared.counts import counted
from shared.cpus import own_cpus, usable_cpus


class Scale(Struct, frozen=True):
    """Between ``minimum`` and ``maximum`` inferers of each model. Those above ``minimum`` are
    stopped after ``idle_s`` seconds without a job."""

    minimum: int
    maximum: int
    idle_s: float

    @property
    def varies(self) -> bool:
        return self.minimum < self.maximum

    @property
    def from_zero(self) -> bool:
        """Whether jobs may arrive before an inferer was started."""
        return self.minimum == 0


def parse_scale(
    inferers: int | None,
    minimum: int | None,
    maximum: int | None,
    idle_s: float,
    models: int = 1,
) -> Scale:
    """The scale of each of ``models`` models for ``--inferers``, ``--min``, ``--max`` and
    ``--idle-s``; None if not given.

    Raises:
        CommandError: the options contradict each other.
    """
    if inferers is not None and (minimum is not None or maximum is not None):
        raise CommandError(
            "--inferers N means --min N --max N; give either --inferers or --min and --max",
            EXIT_USAGE,
        )
    if not idle_s > 0:  # also refuses NaN
        raise CommandError(f"--idle-s {idle_s:g}: give more than 0 seconds", EXIT_USAGE)
    if minimum is None and maximum is None:
        fixed = 1 if inferers is None else inferers
        return Scale(fixed, fixed, idle_s)
    if minimum is None:
        minimum = min(1, maximum or 0)
    if maximum is None:
        maximum = max(minimum, usable_cpus() // models, 1)
    if minimum > maximum:
        raise CommandError(f"--min {minimum} is more than --max {maximum}", EXIT_USAGE)
    return Scale(minimum, maximum, idle_s)


def parse_concurrency(text: str) -> StartConcurrency:
    """The value of ``--concurrency``.

    Raises:
        CommandError: neither a number from 1 to 64 nor ``auto``.
    """
    try:
        concurrency: StartConcurrency = msgspec.convert(text, StartConcurrency, strict=False)
    except msgspec.ValidationError:
        raise CommandError(
            f"--concurrency {text}: give a number from 1 to 64, or auto", EXIT_USAGE
        ) from None
    return concurrency


def cpu_shares(scale: Scale, models: int = 1) -> list[list[int]] | list[None]:
    """The CPUs of each inferer, up to the maximum of each model; None means all CPUs.

    Raises:
        CommandError: there are more inferers than CPUs.
    """
    inferers = scale.maximum * models
    if inferers == 1:
        return [None]  # a single inferer is not pinned
    parts = split_cpus(own_cpus()[: usable_cpus()], inferers)
    _check_threads(min(len(part) for part in parts) if parts else 1)
    return parts


def split_cpus(cpus: list[int], inferers: int) -> list[list[int]]:
    """Divide ``cpus`` into disjoint parts of about equal size, one for each inferer.

    llama.cpp's threads busy-wait for each other, so two inferers on one core would be several times
    slower than one after the other.

    Raises:
        CommandError: there are more inferers than CPUs.
    """
    if inferers > len(cpus):
        raise CommandError(
            f"{inferers} inferers on {counted(len(cpus), 'CPU')}: two inferers on one CPU are "
            f"several times slower than one; give at most {len(cpus)} in all",
            EXIT_USAGE,
        )
    return [cpus[number::inferers] for number in range(inferers)]


def _check_threads(cpus: int) -> None:
    """The inferers inherit INFERER_THREADS; more threads than CPUs would wait for each other."""
    threads = os.environ.get("INFERER_THREADS", "")
    if threads.isdecimal() and int(threads) > cpus:
        raise CommandError(
            f"INFERER_THREADS={threads}: each inferer gets {counted(cpus, 'CPU')} here, and more "
            "threads would wait for each other; unset it, or start fewer inferers",
            EXIT_USAGE,
        )
