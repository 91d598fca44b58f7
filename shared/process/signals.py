"""Blocks and unblocks SIGTERM and SIGINT, the signals that stop a service."""

import signal

SHUTDOWN_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def block_signals() -> None:
    """Block the signals until `unblock_signals`. During an import, Ctrl-C would print a traceback,
    and SIGTERM would end the process at once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SHUTDOWN_SIGNALS)


def unblock_signals() -> None:
    """Deliver signals that are pending, and later ones."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHUTDOWN_SIGNALS)
