"""SIGTERM and SIGINT, which ask a service to stop."""

import signal

STOPPING = (signal.SIGTERM, signal.SIGINT)


def hold_signals() -> None:
    """Hold them back until `release_signals`. In the middle of an import, Ctrl-C would be a
    traceback, and SIGTERM a death that nobody was asked for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def release_signals() -> None:
    """Receive what came meanwhile, and what comes."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
