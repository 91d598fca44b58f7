"""Child processes that end when their parent does, however it ends."""

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>

_libc = ctypes.CDLL(None)


def with_parent(number: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: have the kernel send ``number`` to the child when this process is gone.

    It counts the thread that starts the child, which must live as long as the process.
    """
    parent = os.getpid()

    def set_up() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it was gone before the kernel could be asked
            os._exit(1)

    return set_up
