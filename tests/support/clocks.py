"""Processes whose host has a wrong clock: the C library's answers are shifted for them alone."""

import subprocess
from pathlib import Path

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, at);
    const char *shift = getenv("CLOCK_SHIFT_S");
    if (status == 0 && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        at->tv_sec += atol(shift);
    return status;
}
"""


def shifted_clock(folder: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose clock is so far ahead, or behind where it is negative."""
    source, library = folder / "clock.c", folder / "clock.so"
    if not library.exists():
        source.write_text(SOURCE)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True
        )
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT_S": str(seconds)}


class Clock:
    """A clock for code that takes one; it moves when a test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
