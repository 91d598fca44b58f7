"""How many inferers `sluice up` runs, and on which CPUs each."""

import os

from msgspec import Struct

from cli.exit_status import EXIT_USAGE, CommandError
from shared.cpus import own_cpus, usable_cpus


class Scale(Struct, frozen=True):
    """Never fewer inferers than ``least``, never more than ``most``.

    Those above ``least`` leave when they have had no job for ``idle_s``.
    """

    least: int
    most: int
    idle_s: float

    @property
    def varies(self) -> bool:
        return self.least < self.most

    @property
    def from_zero(self) -> bool:
        """Whether the first job may come before the first inferer; one elsewhere, if none runs
        here."""
        return self.least == 0


def scale_of(inferers: int | None, least: int | None, most: int | None, idle_s: float) -> Scale:
    """What ``--inferers``, ``--min``, ``--max`` and ``--idle-s`` ask for; None was not given.

    Raises:
        CommandError: they contradict each other.
    """
    if inferers is not None and (least is not None or most is not None):
        raise CommandError(
            "--inferers N means --min N --max N; give either --inferers or --min and --max",
            EXIT_USAGE,
        )
    if not idle_s > 0:  # not a number is not, either
        raise CommandError(f"--idle-s {idle_s:g}: give more than 0 seconds", EXIT_USAGE)
    if least is None and most is None:
        fixed = 1 if inferers is None else inferers
        return Scale(fixed, fixed, idle_s)
    if least is None:
        least = min(1, most or 0)
    if most is None:
        most = max(least, usable_cpus())
    if least > most:
        raise CommandError(f"--min {least} is more than --max {most}", EXIT_USAGE)
    return Scale(least, most, idle_s)


def shares(scale: Scale) -> list[list[int]] | list[None]:
    """The CPUs of each inferer there may be.

    Raises:
        CommandError: there may be more inferers than CPUs.
    """
    if scale.most == 1:
        return [None]  # one alone goes where the kernel wants it
    parts = share_out(own_cpus()[: usable_cpus()], scale.most)
    _check_threads(min(len(part) for part in parts) if parts else 1)
    return parts


def share_out(cpus: list[int], inferers: int) -> list[list[int]]:
    """Disjoint parts of ``cpus``, as equal as can be, one for each inferer.

    Threads of llama.cpp wait for each other in a loop: two inferers on one core are several times
    slower than one after the other.

    Raises:
        CommandError: there are more inferers than CPUs.
    """
    if inferers > len(cpus):
        raise CommandError(
            f"{inferers} inferers: there are {len(cpus)} CPUs, and two inferers on one would be "
            f"several times slower than one; give at most {len(cpus)}",
            EXIT_USAGE,
        )
    return [cpus[number::inferers] for number in range(inferers)]


def _check_threads(cpus: int) -> None:
    """The inferers inherit their number of threads; more than CPUs would wait for each other."""
    threads = os.environ.get("INFERER_THREADS", "")
    if threads.isdecimal() and int(threads) > cpus:
        raise CommandError(
            f"INFERER_THREADS={threads}: each inferer has {cpus} CPUs to itself here, and more "
            "threads would wait for each other; leave it out, or start fewer inferers",
            EXIT_USAGE,
        )
