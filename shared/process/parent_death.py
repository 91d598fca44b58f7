"""Child processes that end when their parent ends, in whatever way."""

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>

_libc = ctypes.CDLL(None)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: the kernel sends ``number`` to the child when this process ends.

    The kernel watches the thread that starts the child, so that thread must live as long as the
    process.
    """
    parent = os.getpid()

    def set_up() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)

    return set_up
